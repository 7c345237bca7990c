// Engine's methods that turn ids into bytes, and those about the vocabulary.
#include <memory>

#include "python/engine.h"

namespace fastformer::python {

namespace {

using bpe::IdBuffer;
using bpe::kNone;
using bpe::Span;
using bpe::Vocab;

PyObject* decode(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        if (!PyArg_ParseTuple(args, "O:decode", &object)) return nullptr;
        const Vocab& vocab = engine_of(self).vocab;
        IdBuffer listed;
        std::unique_ptr<Buffer> view;
        const uint32_t* ids;
        size_t n;
        if (PyObject_CheckBuffer(object)) {
            view = std::make_unique<Buffer>(object);
            ids = view->numbers();
            n = view->count();
        } else {
            Ref sequence(PySequence_List(object));
            if (!sequence) return nullptr;
            n = static_cast<size_t>(PyList_Size(sequence.get()));
            uint32_t* to = listed.room(n);
            for (size_t i = 0; i < n; i++) {
                PyObject* item = PyList_GetItem(sequence.get(), static_cast<Py_ssize_t>(i));
                Ref index(PyNumber_Index(item));
                if (!index) throw PythonError{};
                int overflow;
                long long id = PyLong_AsLongLongAndOverflow(index.get(), &overflow);
                if (id == -1 && PyErr_Occurred()) throw PythonError{};
                if (overflow || id < 0 || id > bpe::kMaxId) bad_id(item);
                to[i] = static_cast<uint32_t>(id);
            }
            ids = listed.data();
        }
        size_t bad, total = vocab.measure(ids, n, bad);
        if (bad < n) {
            Ref id(PyLong_FromUnsignedLong(ids[bad]));
            bad_id(id.get());
        }
        Ref bytes(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(total)));
        if (!bytes) return nullptr;
        vocab.decode(ids, n, reinterpret_cast<uint8_t*>(PyBytes_AsString(bytes.get())), total);
        return bytes.release();
    });
}

PyObject* lengths(PyObject* self, PyObject* object) {
    return guarded([&]() -> PyObject* {
        Buffer ids(object);
        IdBuffer out;
        uint32_t* to = out.room(ids.count());
        for (size_t i = 0; i < ids.count(); i++) {
            to[i] = static_cast<uint32_t>(engine_of(self).vocab.bytes_of(ids.numbers()[i]).size);
            if (!to[i]) {
                Ref id(PyLong_FromUnsignedLong(ids.numbers()[i]));
                bad_id(id.get());
            }
        }
        return number_array(to, ids.count());
    });
}

PyObject* token_id(PyObject* self, PyObject* object) {
    return guarded([&]() -> PyObject* {
        Buffer bytes(object);
        const Vocab& vocab = engine_of(self).vocab;
        uint32_t token = bytes.size() && bytes.size() <= vocab.longest() ? vocab.find(bytes.data(), bytes.size()) : kNone;
        if (token == kNone) return Py_NewRef(Py_None);
        return PyLong_FromUnsignedLong(vocab.external(token));
    });
}

PyObject* merges(PyObject* self, PyObject*) {
    return guarded([&]() -> PyObject* {
        const Vocab& vocab = engine_of(self).vocab;
        IdBuffer out;
        for (uint32_t token = 256; token < vocab.size(); token++)
            if (vocab.reachable(token)) {
                out.push(vocab.external(vocab.left(token)));
                out.push(vocab.external(vocab.right(token)));
                out.push(vocab.external(token));
            }
        return number_array(out.data(), out.size());
    });
}

PyObject* id_limit(PyObject* self, PyObject*) { return PyLong_FromSize_t(engine_of(self).vocab.id_limit()); }

}  // namespace

PyMethodDef decode_methods[] = {
    {"decode", decode, METH_VARARGS, "decode(ids) -> bytes"},
    {"lengths", lengths, METH_O, "lengths(ids) -> bytes of each id, uint32"},
    {"token_id", token_id, METH_O, "token_id(bytes) -> id or None"},
    {"merges", merges, METH_NOARGS, "merges() -> (left, right, merged) ids in the order of rank, uint32"},
    {"id_limit", id_limit, METH_NOARGS, "id_limit() -> one more than the highest id"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastformer::python
