// Where Engines come from: tokens and merges, a rank file, an image of an earlier one.
#include <memory>
#include <vector>

#include "bpe/image.h"
#include "bpe/ranks.h"
#include "python/engine.h"

namespace fastformer::python {

namespace {

using bpe::Span;
using bpe::Vocab;

std::vector<Span> spans_of(PyObject* list) {
    if (!PyList_Check(list)) throw std::invalid_argument("tokens must be a list of bytes");
    std::vector<Span> spans(static_cast<size_t>(PyList_Size(list)));
    for (size_t i = 0; i < spans.size(); i++) {
        char* data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyList_GetItem(list, static_cast<Py_ssize_t>(i)), &data, &size) < 0)
            throw PythonError{};
        spans[i] = {reinterpret_cast<const uint8_t*>(data), static_cast<size_t>(size)};
    }
    return spans;
}

void add_specials(Engine& engine, PyObject* tokens, PyObject* ids) {
    std::vector<Span> spans = spans_of(tokens);
    Buffer numbers(ids);
    if (numbers.count() != spans.size()) throw std::invalid_argument("special tokens and ids must be of one length");
    for (size_t i = 0; i < spans.size(); i++) engine.vocab.add_special(numbers.numbers()[i], spans[i]);
}

PyObject* wrap(PyTypeObject* type, std::unique_ptr<Engine> engine) {
    PyObject* module = PyType_GetModule(type);
    Ref ids_type(module ? PyObject_GetAttrString(module, "Ids") : nullptr);
    if (!ids_type) throw PythonError{};
    PyObject* self = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) throw PythonError{};
    object_of(self)->engine = engine.release();
    object_of(self)->ids_type = ids_type.release();
    return self;
}

PyObject* from_ranks(PyObject* type, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *data, *extra, *extra_ids;
        if (!PyArg_ParseTuple(args, "OOO:from_ranks", &data, &extra, &extra_ids)) return nullptr;
        auto engine = std::make_unique<Engine>();
        Buffer file(data);
        {
            GilRelease release(true);
            bpe::Ranks ranks = bpe::read_ranks(file.data(), file.size());
            engine->vocab.build(ranks.tokens, ranks.ids, nullptr, true);
        }
        add_specials(*engine, extra, extra_ids);
        return wrap(reinterpret_cast<PyTypeObject*>(type), std::move(engine));
    });
}

PyObject* from_image(PyObject* type, PyObject* data) {
    return guarded([&]() -> PyObject* {
        auto engine = std::make_unique<Engine>();
        Buffer image(data);
        bpe::read_image(engine->vocab, image.data(), image.size());
        return wrap(reinterpret_cast<PyTypeObject*>(type), std::move(engine));
    });
}

PyObject* image(PyObject* self, PyObject*) {
    return guarded([&]() -> PyObject* {
        std::vector<uint8_t> bytes = bpe::write_image(engine_of(self).vocab);
        return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(bytes.data()), static_cast<Py_ssize_t>(bytes.size()));
    });
}

PyObject* vocabulary(PyObject* self, PyObject*) {
    return guarded([&]() -> PyObject* {
        const Vocab& vocab = engine_of(self).vocab;
        Ref dict(PyDict_New());
        if (!dict) return nullptr;
        std::vector<uint32_t> order(vocab.size());
        for (uint32_t token = 0; token < vocab.size(); token++) order[token] = vocab.external(token);
        std::sort(order.begin(), order.end());
        for (uint32_t id : order) {
            Span s = vocab.bytes_of(id);
            Ref bytes(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(s.data), static_cast<Py_ssize_t>(s.size)));
            Ref number(PyLong_FromUnsignedLong(id));
            if (!bytes || !number || PyDict_SetItem(dict.get(), bytes.get(), number.get()) < 0) return nullptr;
        }
        return dict.release();
    });
}

}  // namespace

PyObject* new_engine(PyTypeObject* type, PyObject* args, PyObject*) {
    return guarded([&]() -> PyObject* {
        PyObject *tokens, *ids, *merge_list, *extra, *extra_ids;
        int whole;
        if (!PyArg_ParseTuple(args, "OOOpOO:Engine", &tokens, &ids, &merge_list, &whole, &extra, &extra_ids))
            return nullptr;
        auto engine = std::make_unique<Engine>();
        std::vector<Span> spans = spans_of(tokens);
        Buffer id_buffer(ids);
        if (id_buffer.count() != spans.size()) throw std::invalid_argument("tokens and ids must be of one length");
        std::vector<uint32_t> numbers(id_buffer.numbers(), id_buffer.numbers() + id_buffer.count());
        if (merge_list == Py_None) {
            engine->vocab.build(spans, numbers, nullptr, whole != 0);
        } else {
            Buffer m(merge_list);
            std::vector<Vocab::Merge> list(m.count() / 3);
            for (size_t i = 0; i < list.size(); i++) {
                list[i] = {m.numbers()[3 * i], m.numbers()[3 * i + 1], m.numbers()[3 * i + 2]};
                if (list[i].left >= spans.size() || list[i].right >= spans.size() || list[i].merged >= spans.size())
                    throw std::invalid_argument("merges name a token that is not there");
            }
            engine->vocab.build(spans, numbers, &list, whole != 0);
        }
        add_specials(*engine, extra, extra_ids);
        return wrap(type, std::move(engine));
    });
}

PyMethodDef load_methods[] = {
    {"from_ranks", from_ranks, METH_VARARGS | METH_CLASS,
     "from_ranks(data, special_tokens, special_ids): of the bytes of a .tiktoken file"},
    {"from_image", from_image, METH_O | METH_CLASS, "from_image(data): of what `image` gave"},
    {"image", image, METH_NOARGS, "image() -> bytes that from_image reads"},
    {"vocabulary", vocabulary, METH_NOARGS, "vocabulary() -> dict of ordinary tokens' bytes and ids, in the order of ids"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastformer::python
