// The type Ids: uint32 numbers that the engine made, for whoever asks with the buffer protocol, without a copy.
#pragma once
#include "bpe/buffer.h"
#include "python/common.h"

namespace fastformer::python {

// Takes the content of `ids`; `type` is the type Ids of the module that asks.
PyObject* new_ids(PyObject* type, bpe::IdBuffer& ids);
PyObject* add_ids_type(PyObject* module);

}  // namespace fastformer::python
