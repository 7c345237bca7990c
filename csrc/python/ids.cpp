#include "python/ids.h"

#include <cstdlib>

namespace fastformer::python {

namespace {

struct IdsObject {
    PyObject_HEAD
    uint32_t* data;
    Py_ssize_t bytes;
};

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
    auto* ids = reinterpret_cast<IdsObject*>(self);
    static uint32_t nothing;
    return PyBuffer_FillInfo(view, self, ids->data ? ids->data : &nothing, ids->bytes, 0, flags);
}

void free_ids(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    std::free(reinterpret_cast<IdsObject*>(self)->data);
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyType_Slot slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_ids)},
    {0, nullptr},
};

PyType_Spec spec = {"fastformer.tokenizer._bpe.Ids", sizeof(IdsObject), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

}  // namespace

PyObject* new_ids(PyObject* type, bpe::IdBuffer& ids) {
    auto* ids_type = reinterpret_cast<PyTypeObject*>(type);
    PyObject* self = reinterpret_cast<allocfunc>(PyType_GetSlot(ids_type, Py_tp_alloc))(ids_type, 0);
    if (!self) throw PythonError{};
    auto* object = reinterpret_cast<IdsObject*>(self);
    object->bytes = static_cast<Py_ssize_t>(ids.size() * sizeof(uint32_t));
    object->data = ids.release();
    return self;
}

PyObject* add_ids_type(PyObject* module) {
    Ref type(PyType_FromSpec(&spec));
    if (!type || PyModule_AddObjectRef(module, "Ids", type.get()) < 0) return nullptr;
    return type.release();
}

}  // namespace fastformer::python
