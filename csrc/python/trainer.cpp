// The type Trainer: counts words of texts, then learns merges from them.
#include <cstring>
#include <memory>

#include "bpe/buffer.h"
#include "bpe/trainer.h"
#include "bpe/unicode.h"
#include "python/common.h"

namespace fastformer::python {

namespace {

struct TrainerObject {
    PyObject_HEAD
    bpe::WordCounts* words;
};

bpe::WordCounts& words_of(PyObject* self) { return *reinterpret_cast<TrainerObject*>(self)->words; }

PyObject* add(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long number;
        int by_line;
        if (!PyArg_ParseTuple(args, "Olp:add", &object, &number, &by_line)) return nullptr;
        Text text(object);
        bpe::Pattern pattern = pattern_from(number);
        size_t valid = text.is_str() ? text.size() : unicode::valid_utf8_prefix(text.data(), text.size());
        if (valid != text.size())
            throw std::invalid_argument("the text is not UTF-8: byte " + std::to_string(valid) + " is no character");
        // The trainer belongs to one call of training.train, so that no other thread touches its words.
        GilRelease release(text.size() >= kReleaseBytes);
        for (size_t i = 0; i < text.size();) {
            const uint8_t* p = text.data() + i;
            const void* newline = by_line ? std::memchr(p, '\n', text.size() - i) : nullptr;
            size_t n = newline ? static_cast<size_t>(static_cast<const uint8_t*>(newline) - p) + 1 : text.size() - i;
            words_of(self).add_text(pattern, bpe::best_isa(), p, n);
            i += n;
        }
        return Py_NewRef(Py_None);
    });
}

PyObject* add_pieces(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *object, *boundaries;
        if (!PyArg_ParseTuple(args, "OO:add_pieces", &object, &boundaries)) return nullptr;
        Text text(object);
        Buffer ends(boundaries);
        size_t start = 0;
        for (size_t i = 0; i < ends.count(); start = ends.numbers()[i++]) {
            size_t end = ends.numbers()[i];
            if (end < start || end > text.size()) throw std::invalid_argument("ends must rise and stay within the text");
            if (end > start) words_of(self).add(text.data() + start, end - start, 1);
        }
        return Py_NewRef(Py_None);
    });
}

PyObject* train(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        Py_ssize_t vocab_size, max_token_length;
        long long min_frequency;
        PyObject *specials, *progress;
        if (!PyArg_ParseTuple(args, "nLnOO:train", &vocab_size, &min_frequency, &max_token_length, &specials, &progress))
            return nullptr;
        bpe::TrainOptions options{static_cast<size_t>(vocab_size), min_frequency, static_cast<size_t>(max_token_length), {}};
        for (Py_ssize_t i = 0; i < PyList_Size(specials); i++) {
            char* data;
            Py_ssize_t size;
            if (PyBytes_AsStringAndSize(PyList_GetItem(specials, i), &data, &size) < 0) return nullptr;
            options.specials.emplace_back(data, static_cast<size_t>(size));
        }
        bool failed = false;
        bpe::TrainResult result;
        {
            GilRelease release(true);
            try {
                result = bpe::train(words_of(self), options, [&](size_t done) {
                    PyGILState_STATE state = PyGILState_Ensure();
                    failed = PyErr_CheckSignals() < 0;
                    if (!failed && progress != Py_None) {
                        Ref answer(PyObject_CallFunction(progress, "n", static_cast<Py_ssize_t>(done)));
                        failed = !answer;
                    }
                    PyGILState_Release(state);
                    return !failed;
                });
            } catch (const std::runtime_error&) {
                if (!failed) throw;
            }
        }
        if (failed) return nullptr;
        Ref tokens(PyList_New(0));
        if (!tokens) return nullptr;
        for (const std::string& s : result.tokens) {
            Ref bytes(PyBytes_FromStringAndSize(s.data(), static_cast<Py_ssize_t>(s.size())));
            if (!bytes || PyList_Append(tokens.get(), bytes.get()) < 0) return nullptr;
        }
        bpe::IdBuffer merges;
        for (const auto& m : result.merges) {
            merges.push(m.left);
            merges.push(m.right);
            merges.push(m.merged);
        }
        Ref numbers(number_array(merges.data(), merges.size()));
        if (!numbers) return nullptr;
        return PyTuple_Pack(2, tokens.get(), numbers.get());
    });
}

PyObject* new_trainer(PyTypeObject* type, PyObject*, PyObject*) {
    return guarded([&]() -> PyObject* {
        auto words = std::make_unique<bpe::WordCounts>();
        PyObject* self = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0);
        if (!self) return nullptr;
        reinterpret_cast<TrainerObject*>(self)->words = words.release();
        return self;
    });
}

void free_trainer(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete reinterpret_cast<TrainerObject*>(self)->words;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"add", add, METH_VARARGS, "add(text, pattern, by_line): count the pretokens of a text"},
    {"add_pieces", add_pieces, METH_VARARGS, "add_pieces(text, ends): count pretokens that end at the uint32 offsets"},
    {"train", train, METH_VARARGS,
     "train(vocab_size, min_frequency, max_token_length, specials, progress) -> (tokens, uint32 merges)"},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot type_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(new_trainer)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_trainer)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec type_spec = {"fastformer.tokenizer._bpe.Trainer", sizeof(TrainerObject), 0, Py_TPFLAGS_DEFAULT, type_slots};

}  // namespace

bool add_trainer_type(PyObject* module) {
    Ref type(PyType_FromSpec(&type_spec));
    return type && PyModule_AddObjectRef(module, "Trainer", type.get()) == 0;
}

}  // namespace fastformer::python
