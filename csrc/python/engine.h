// One vocabulary, and encoders for as many threads as call it at once.
#pragma once
#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "bpe/encoder.h"
#include "python/common.h"

namespace fastformer::python {

// Idle encoders wait in slots that are taken and given back by atomic exchange: no lock that a fork could leave held.
class Engine {
  public:
    bpe::Vocab vocab;

    Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    ~Engine() {
        delete own_;
        for (auto& slot : idle_) delete slot.load();
        for (PyObject* number : numbers_) Py_XDECREF(number);
    }
    std::unique_ptr<bpe::Encoder> take() {
        for (auto& slot : idle_)
            if (bpe::Encoder* e = slot.exchange(nullptr, std::memory_order_acquire)) return std::unique_ptr<bpe::Encoder>(e);
        return bpe::Encoder::make(vocab, bpe::best_isa());
    }
    void give(std::unique_ptr<bpe::Encoder> encoder) {
        for (auto& slot : idle_) {
            bpe::Encoder* none = nullptr;
            if (slot.compare_exchange_strong(none, encoder.get(), std::memory_order_release)) {
                encoder.release();
                return;
            }
        }
    }
    // The same for callers that hold the GIL: most calls are short, and two atomic exchanges are a tenth of the shortest.
    std::unique_ptr<bpe::Encoder> take_with_gil() {
#ifndef Py_GIL_DISABLED
        if (own_) return std::unique_ptr<bpe::Encoder>(std::exchange(own_, nullptr));
#endif
        return take();
    }
    void give_with_gil(std::unique_ptr<bpe::Encoder> encoder) {
#ifndef Py_GIL_DISABLED
        if (!own_) {
            own_ = encoder.release();
            return;
        }
#endif
        give(std::move(encoder));
    }
    // An int, a new reference. An id's int is made once and lent out from then on: half the time of a list of ids is
    // making ints. The GIL guards the table; builds without one make every int anew.
    PyObject* number(uint32_t id) {
#ifdef Py_GIL_DISABLED
        return PyLong_FromUnsignedLong(id);
#else
        if (id >= numbers_.size()) {
            if (id >= vocab.id_limit() || id >= kNumbers) return PyLong_FromUnsignedLong(id);
            numbers_.resize(std::min<size_t>(vocab.id_limit(), kNumbers));
        }
        if (!numbers_[id]) numbers_[id] = PyLong_FromUnsignedLong(id);
        Py_XINCREF(numbers_[id]);
        return numbers_[id];
#endif
    }

  private:
    static constexpr size_t kNumbers = size_t{1} << 20;
    std::atomic<bpe::Encoder*> idle_[16] = {};
    bpe::Encoder* own_ = nullptr;  // the GIL guards it
    std::vector<PyObject*> numbers_;
};

// `with_gil`: whether the thread holds the GIL at the beginning and at the end.
template <bool with_gil>
class Lease {
  public:
    explicit Lease(Engine& engine) : engine_(engine), encoder_(with_gil ? engine.take_with_gil() : engine.take()) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { with_gil ? engine_.give_with_gil(std::move(encoder_)) : engine_.give(std::move(encoder_)); }
    bpe::Encoder* operator->() const { return encoder_.get(); }
    bpe::Encoder& operator*() const { return *encoder_; }

  private:
    Engine& engine_;
    std::unique_ptr<bpe::Encoder> encoder_;
};

struct EngineObject {
    PyObject_HEAD
    Engine* engine;
    PyObject* ids_type;
};

inline EngineObject* object_of(PyObject* self) { return reinterpret_cast<EngineObject*>(self); }
inline Engine& engine_of(PyObject* self) { return *object_of(self)->engine; }

// The ids of `object`, a text, as a list.
PyObject* encode_list(Engine& engine, long pattern, PyObject* object);

[[noreturn]] inline void bad_id(PyObject* id) {
    PyErr_SetObject(PyExc_KeyError, id);
    throw PythonError{};
}

// The methods of Engine, by file.
extern PyMethodDef load_methods[], encode_methods[], decode_methods[];
PyObject* new_engine(PyTypeObject* type, PyObject* args, PyObject* keywords);

}  // namespace fastformer::python
