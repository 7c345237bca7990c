// Many texts at once: a sequence of str and bytes-like objects, or an Arrow array of strings.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "bpe/vocab.h"
#include "python/common.h"

namespace fastformer::python {

// The texts stay where they are and are held for the lifetime of this object.
class Texts {
  public:
    // Raises TypeError for what is neither, ValueError for Arrow data of other types than string and large_string.
    explicit Texts(PyObject* object);
    Texts(const Texts&) = delete;
    Texts& operator=(const Texts&) = delete;
    ~Texts();
    const std::vector<bpe::Span>& spans() const { return spans_; }
    // Whether a text is known to be UTF-8.
    const std::vector<bool>& checked() const { return checked_; }

  private:
    struct Arrow;
    void from_sequence(PyObject* object);
    void from_arrow(PyObject* object, const char* method);

    Ref list_;
    std::deque<Text> held_;
    std::unique_ptr<Arrow> arrow_;
    std::vector<bpe::Span> spans_;
    std::vector<bool> checked_;
};

}  // namespace fastformer::python
