#include "python/common.h"

#include "bpe/unicode_data.h"
#include "python/ids.h"

namespace fastformer::python {

Text::Text(PyObject* object) {
    if (PyUnicode_Check(object)) {
        is_str_ = true;
        Py_ssize_t size;
        const char* data = PyUnicode_AsUTF8AndSize(object, &size);
        if (!data) {
            if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw PythonError{};
            PyErr_Clear();
            Ref encoded(PyObject_CallMethod(object, "encode", "ss", "utf-16", "surrogatepass"));
            if (!encoded) throw PythonError{};
            replaced_.reset(PyObject_CallMethod(encoded.get(), "decode", "ss", "utf-16", "replace"));
            if (!replaced_ || !(data = PyUnicode_AsUTF8AndSize(replaced_.get(), &size))) throw PythonError{};
        }
        data_ = reinterpret_cast<const uint8_t*>(data);
        size_ = static_cast<size_t>(size);
        return;
    }
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError, "text must be str or a bytes-like object, got %R", Py_TYPE(object));
        throw PythonError{};
    }
    if (PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) < 0) throw PythonError{};
    data_ = static_cast<const uint8_t*>(view_.buf);
    size_ = static_cast<size_t>(view_.len);
}

bpe::Pattern pattern_from(long number) {
    if (number < 0 || number >= static_cast<long>(bpe::Pattern::kCount))
        throw std::invalid_argument("pattern: no scanner has the number " + std::to_string(number));
    return static_cast<bpe::Pattern>(number);
}

PyObject* number_array(const uint32_t* data, size_t count) {
    return PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(data), static_cast<Py_ssize_t>(count * 4));
}

namespace {

int execute(PyObject* module) {
    Ref ids(add_ids_type(module));
    if (!ids || !add_engine_type(module) || !add_trainer_type(module)) return -1;
    if (PyModule_AddIntConstant(module, "best_isa", static_cast<long>(bpe::best_isa())) < 0) return -1;
    return PyModule_AddStringConstant(module, "unicode_version", unicode::kVersion);
}

PyObject* has_isa(PyObject*, PyObject* number) {
    long isa = PyLong_AsLong(number);
    if (isa == -1 && PyErr_Occurred()) return nullptr;
    return PyBool_FromLong(isa >= 0 && isa <= 3 && bpe::has_isa(static_cast<bpe::Isa>(isa)));
}

PyMethodDef functions[] = {
    {"has_isa", has_isa, METH_O, "has_isa(number) -> whether scanners for 0 scalar, 1 NEON, 2 AVX2, 3 AVX-512 run here"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_bpe", "Byte-level BPE in C++; use fastformer.tokenizer.", 0, functions, slots,
    nullptr,               nullptr, nullptr,
};

}  // namespace
}  // namespace fastformer::python

PyMODINIT_FUNC PyInit__bpe() { return PyModuleDef_Init(&fastformer::python::definition); }
