// The type Engine, and the type Encoding, through which a tokenizer's shortest calls go without a step in Python.
#include "python/engine.h"

#include <vector>

namespace fastformer::python {

namespace {

void free_engine(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete object_of(self)->engine;
    Py_XDECREF(object_of(self)->ids_type);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

struct EncodingObject {
    PyObject_HEAD
    PyObject* engine;
    long pattern;  // of texts that go to the engine as they are; -1: Python has something to do first
};

EncodingObject* encoding_of(PyObject* self) { return reinterpret_cast<EncodingObject*>(self); }

PyObject* bind(PyObject* self, PyObject* args) {
    PyObject *engine, *type = PyTuple_Size(args) > 0 ? reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GetItem(args, 0))) : nullptr;
    long pattern;
    if (!PyArg_ParseTuple(args, "Ol:_bind", &engine, &pattern)) return nullptr;
    // Only this module's Engine has this destructor.
    if (PyType_GetSlot(reinterpret_cast<PyTypeObject*>(type), Py_tp_dealloc) != reinterpret_cast<void*>(free_engine)) {
        PyErr_SetString(PyExc_TypeError, "_bind takes an Engine and a pattern");
        return nullptr;
    }
    Py_INCREF(engine);
    Py_XDECREF(encoding_of(self)->engine);
    encoding_of(self)->engine = engine;
    encoding_of(self)->pattern = pattern;
    return Py_NewRef(Py_None);
}

// Whether the keyword arguments ask for nothing: no special token is allowed, none disallowed.
bool asks_nothing(PyObject* names, PyObject* const* values) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(names); i++) {
        PyObject* name = PyTuple_GetItem(names, i);
        if (PyUnicode_CompareWithASCIIString(name, "allowed_special") != 0 &&
            PyUnicode_CompareWithASCIIString(name, "disallowed_special") != 0)
            return false;
        bool empty = (PyTuple_Check(values[i]) && PyTuple_Size(values[i]) == 0) ||
                     (PyAnySet_Check(values[i]) && PySet_Size(values[i]) == 0);
        if (!empty) return false;
    }
    return true;
}

PyObject* encode(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    EncodingObject* encoding = encoding_of(self);
    if (count == 1 && encoding->engine && encoding->pattern >= 0 && (!names || asks_nothing(names, args + 1)))
        return encode_list(engine_of(encoding->engine), encoding->pattern, args[0]);
    Ref general(PyObject_GetAttrString(self, "_encode")), positional(PyTuple_New(count)), keywords(PyDict_New());
    if (!general || !positional || !keywords) return nullptr;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (PyTuple_SetItem(positional.get(), i, Py_NewRef(args[i])) < 0) return nullptr;
    }
    for (Py_ssize_t i = 0; names && i < PyTuple_Size(names); i++)
        if (PyDict_SetItem(keywords.get(), PyTuple_GetItem(names, i), args[count + i]) < 0) return nullptr;
    return PyObject_Call(general.get(), positional.get(), keywords.get());
}

void free_encoding(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    Py_XDECREF(encoding_of(self)->engine);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyMethodDef encoding_methods[] = {
    {"_bind", bind, METH_VARARGS, "_bind(engine, pattern): what `encode` hands texts to"},
    {"encode", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(encode)), METH_FASTCALL | METH_KEYWORDS,
     "encode($self, text, *, allowed_special=(), disallowed_special=())\n--\n\n"
     "The ids of `text`, as a list.\n\n"
     "Args:\n"
     "    text: str, or UTF-8 in anything with the buffer protocol.\n"
     "    allowed_special: special tokens to recognise; \"all\" for every one.\n"
     "    disallowed_special: special tokens whose text raises ValueError; \"all\" for every one not allowed."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot encoding_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(free_encoding)},
    {Py_tp_methods, encoding_methods},
    {0, nullptr},
};

PyType_Spec encoding_spec = {"fastformer.tokenizer._bpe.Encoding", sizeof(EncodingObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, encoding_slots};

}  // namespace

bool add_engine_type(PyObject* module) {
    // A type has one list of methods; they are written in several files.
    static std::vector<PyMethodDef> methods = [] {
        std::vector<PyMethodDef> all;
        for (PyMethodDef* list : {load_methods, encode_methods, decode_methods})
            for (PyMethodDef* m = list; m->ml_name; m++) all.push_back(*m);
        all.push_back({nullptr, nullptr, 0, nullptr});
        return all;
    }();
    PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(new_engine)},
        {Py_tp_dealloc, reinterpret_cast<void*>(free_engine)},
        {Py_tp_methods, methods.data()},
        {0, nullptr},
    };
    PyType_Spec spec = {"fastformer.tokenizer._bpe.Engine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT, slots};
    Ref type(PyType_FromModuleAndSpec(module, &spec, nullptr));
    if (!type || PyModule_AddObjectRef(module, "Engine", type.get()) < 0) return false;
    Ref encoding(PyType_FromSpec(&encoding_spec));
    return encoding && PyModule_AddObjectRef(module, "Encoding", encoding.get()) == 0;
}

}  // namespace fastformer::python
