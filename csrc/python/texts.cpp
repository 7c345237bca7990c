// The structures and the rules are those of the Arrow C data interface and its PyCapsule protocol
// (https://arrow.apache.org/docs/format/CDataInterface.html); no Arrow library is needed.
#include "python/texts.h"

namespace fastformer::python {

namespace {

struct ArrowSchema {
    const char *format, *name, *metadata;
    int64_t flags, n_children;
    ArrowSchema **children, *dictionary;
    void (*release)(ArrowSchema*);
    void* private_data;
};

struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void** buffers;
    ArrowArray **children, *dictionary;
    void (*release)(ArrowArray*);
    void* private_data;
};

struct ArrowArrayStream {
    int (*get_schema)(ArrowArrayStream*, ArrowSchema*);
    int (*get_next)(ArrowArrayStream*, ArrowArray*);
    const char* (*get_last_error)(ArrowArrayStream*);
    void (*release)(ArrowArrayStream*);
    void* private_data;
};

template <typename T>
T* of_capsule(PyObject* capsule, const char* name) {
    auto* found = static_cast<T*>(PyCapsule_GetPointer(capsule, name));
    if (!found) throw PythonError{};
    return found;
}

constexpr Py_ssize_t kAhead = 8;  // objects asked for before the first is needed

// Whether offsets have 64 bits.
bool is_large(const ArrowSchema& schema) {
    std::string format = schema.format ? schema.format : "";
    if (schema.dictionary || (format != "u" && format != "U"))
        throw std::invalid_argument("texts: the Arrow type must be string or large_string, got the format '" + format +
                                    (schema.dictionary ? "' with a dictionary" : "'"));
    return format == "U";
}

template <typename Offset>
void add(const ArrowArray& array, std::vector<bpe::Span>& spans) {
    auto* validity = static_cast<const uint8_t*>(array.buffers[0]);
    auto* offsets = static_cast<const Offset*>(array.buffers[1]);
    auto* data = static_cast<const uint8_t*>(array.buffers[2]);
    for (int64_t i = array.offset; i < array.offset + array.length; i++) {
        bool is_null = validity && array.null_count != 0 && !(validity[i / 8] >> (i % 8) & 1);
        spans.push_back(is_null ? bpe::Span{data, 0}
                                : bpe::Span{data + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i])});
    }
}

void add(const ArrowArray& array, bool large, std::vector<bpe::Span>& spans) {
    if (array.length == 0) return;
    if (array.n_buffers != 3 || !array.buffers[1]) throw std::invalid_argument("texts: a malformed Arrow string array");
    large ? add<int64_t>(array, spans) : add<int32_t>(array, spans);
}

}  // namespace

// What must live as long as the spans: the capsules, and the arrays that a stream gave.
struct Texts::Arrow {
    Ref capsules;
    std::deque<ArrowArray> arrays;
    ~Arrow() {
        for (ArrowArray& array : arrays)
            if (array.release) array.release(&array);
    }
};

Texts::Texts(PyObject* object) {
    if (PyObject_HasAttrString(object, "__arrow_c_array__"))
        from_arrow(object, "__arrow_c_array__");
    else if (PyObject_HasAttrString(object, "__arrow_c_stream__"))
        from_arrow(object, "__arrow_c_stream__");
    else
        from_sequence(object);
}

Texts::~Texts() = default;

void Texts::from_sequence(PyObject* object) {
    // A copy of the list, so that other threads cannot take texts out of it meanwhile.
    list_.reset(PySequence_List(object));
    if (!list_) throw PythonError{};
    Py_ssize_t n = PyList_Size(list_.get());
    spans_.reserve(static_cast<size_t>(n));
    checked_.reserve(static_cast<size_t>(n));
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject* item = PyList_GetItem(list_.get(), i);
        if (i + kAhead < n) bpe::fetch(PyList_GetItem(list_.get(), i + kAhead));
        Py_ssize_t size;
        const char* data = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, &size) : nullptr;
        if (data) {
            spans_.push_back({reinterpret_cast<const uint8_t*>(data), static_cast<size_t>(size)});
            checked_.push_back(true);
            continue;
        }
        PyErr_Clear();  // surrogates, which Text knows how to read
        held_.emplace_back(item);
        spans_.push_back({held_.back().data(), held_.back().size()});
        checked_.push_back(held_.back().is_str());
    }
}

void Texts::from_arrow(PyObject* object, const char* method) {
    arrow_ = std::make_unique<Arrow>();
    arrow_->capsules.reset(PyObject_CallMethod(object, method, nullptr));
    if (!arrow_->capsules) throw PythonError{};
    if (PyTuple_Check(arrow_->capsules.get())) {
        if (PyTuple_Size(arrow_->capsules.get()) != 2)
            throw std::invalid_argument("texts: __arrow_c_array__ must give a schema and an array");
        auto* schema = of_capsule<ArrowSchema>(PyTuple_GetItem(arrow_->capsules.get(), 0), "arrow_schema");
        add(*of_capsule<ArrowArray>(PyTuple_GetItem(arrow_->capsules.get(), 1), "arrow_array"), is_large(*schema), spans_);
    } else {
        auto* stream = of_capsule<ArrowArrayStream>(arrow_->capsules.get(), "arrow_array_stream");
        auto check = [&](int code) {
            if (!code) return;
            const char* reason = stream->get_last_error(stream);
            throw std::invalid_argument(std::string("texts: the Arrow stream failed: ") + (reason ? reason : "no reason given"));
        };
        ArrowSchema schema{};
        check(stream->get_schema(stream, &schema));
        std::unique_ptr<ArrowSchema, void (*)(ArrowSchema*)> held(&schema, [](ArrowSchema* s) {
            if (s->release) s->release(s);
        });
        bool large = is_large(schema);
        for (;;) {
            ArrowArray& array = arrow_->arrays.emplace_back();
            check(stream->get_next(stream, &array));
            if (!array.release) break;
            add(array, large, spans_);
        }
    }
    // A producer may be wrong about UTF-8, and a scanner relies on it.
    checked_.assign(spans_.size(), false);
}

}  // namespace fastformer::python
