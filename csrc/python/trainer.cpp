// The type Trainer: counts words of texts, then learns merges from them.
#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

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

// Counts text[0, n), line by line or as a whole.
void count_words(bpe::WordCounts& words, bpe::Pattern pattern, bool by_line, const uint8_t* text, size_t n) {
    for (size_t i = 0; i < n;) {
        const uint8_t* p = text + i;
        const void* newline = by_line ? std::memchr(p, '\n', n - i) : nullptr;
        size_t size = newline ? static_cast<size_t>(static_cast<const uint8_t*>(newline) - p) + 1 : n - i;
        words.add_text(pattern, bpe::best_isa(), p, size);
        i += size;
    }
}

// The same for lines with several threads, each with counts of its own at first.
void count_lines(bpe::WordCounts& words, bpe::Pattern pattern, const uint8_t* text, size_t n, size_t threads) {
    std::vector<bpe::WordCounts> counts(threads - 1);
    std::vector<std::exception_ptr> failed(threads - 1);
    std::vector<std::thread> running;
    auto cut = [&](size_t part) -> size_t {
        if (part == 0 || part == threads) return part ? n : 0;
        size_t from = n / threads * part;
        const void* newline = std::memchr(text + from, '\n', n - from);
        return newline ? static_cast<size_t>(static_cast<const uint8_t*>(newline) - text) + 1 : n;
    };
    auto work = [&](size_t part) {
        try {
            count_words(counts[part], pattern, true, text + cut(part), cut(part + 1) - cut(part));
        } catch (...) {
            failed[part] = std::current_exception();
        }
    };
    try {
        for (size_t part = 0; part + 1 < threads; part++) running.emplace_back(work, part);
    } catch (const std::system_error&) {
        // The system starts no more threads: this one does what is left.
        for (size_t part = running.size(); part + 1 < threads; part++) work(part);
    }
    std::exception_ptr own;
    try {
        count_words(words, pattern, true, text + cut(threads - 1), n - cut(threads - 1));
    } catch (...) {
        own = std::current_exception();
    }
    for (std::thread& thread : running) thread.join();
    if (own) std::rethrow_exception(own);
    for (size_t part = 0; part + 1 < threads; part++) {
        if (failed[part]) std::rethrow_exception(failed[part]);
        words.merge(counts[part]);
        counts[part] = bpe::WordCounts();
    }
}

PyObject* add(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long number;
        int by_line;
        Py_ssize_t threads, base;
        if (!PyArg_ParseTuple(args, "Olpnn:add", &object, &number, &by_line, &threads, &base)) return nullptr;
        Text text(object);
        bpe::Pattern pattern = pattern_from(number);
        size_t valid = text.is_str() ? text.size() : unicode::valid_utf8_prefix(text.data(), text.size());
        if (valid != text.size())
            throw std::invalid_argument("the text is not UTF-8: byte " +
                                        std::to_string(valid + static_cast<size_t>(base)) + " is no character");
        // The trainer belongs to one call of training.train, so that no other thread touches its words.
        GilRelease release(text.size() >= kReleaseBytes);
        size_t parts = std::min<size_t>(static_cast<size_t>(std::max<Py_ssize_t>(threads, 1)), text.size() / (1 << 20) + 1);
        if (by_line && parts > 1)
            count_lines(words_of(self), pattern, text.data(), text.size(), parts);
        else
            count_words(words_of(self), pattern, by_line != 0, text.data(), text.size());
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
    {"add", add, METH_VARARGS, "add(text, pattern, by_line, threads, base): count the pretokens of a text, which stands at byte `base` of its file"},
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
