// The type Engine: one vocabulary, and encoders for as many threads as call it at once.
#include <atomic>
#include <memory>
#include <vector>

#include "bpe/encoder.h"
#include "bpe/unicode.h"
#include "python/common.h"

namespace fastformer::python {

namespace {

using bpe::Encoder;
using bpe::IdBuffer;
using bpe::Isa;
using bpe::kNone;
using bpe::Pattern;
using bpe::Span;
using bpe::Vocab;

// Idle encoders wait in slots that are taken and given back by atomic exchange: no lock that a fork could leave held.
class Engine {
  public:
    Vocab vocab;

    Engine() = default;
    ~Engine() {
        for (auto& slot : idle_) delete slot.load();
    }
    std::unique_ptr<Encoder> take() {
        for (auto& slot : idle_)
            if (Encoder* e = slot.exchange(nullptr, std::memory_order_acquire)) return std::unique_ptr<Encoder>(e);
        return std::make_unique<Encoder>(vocab, bpe::best_isa());
    }
    void give(std::unique_ptr<Encoder> encoder) {
        for (auto& slot : idle_) {
            Encoder* none = nullptr;
            if (slot.compare_exchange_strong(none, encoder.get(), std::memory_order_release)) {
                encoder.release();
                return;
            }
        }
    }

  private:
    std::atomic<Encoder*> idle_[16] = {};
};

class Lease {
  public:
    explicit Lease(Engine& engine) : engine_(engine), encoder_(engine.take()) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { engine_.give(std::move(encoder_)); }
    Encoder* operator->() const { return encoder_.get(); }

  private:
    Engine& engine_;
    std::unique_ptr<Encoder> encoder_;
};

struct EngineObject {
    PyObject_HEAD
    Engine* engine;
};

Engine& engine_of(PyObject* self) { return *reinterpret_cast<EngineObject*>(self)->engine; }

// What bytes that are no UTF-8 become, as tiktoken defines it: the last pretoken before the fault (with all white
// space before it, if it is white space) and everything after it are one pretoken.
void encode_invalid(const Vocab& vocab, Encoder& encoder, Pattern pattern, const uint8_t* p, size_t n, size_t valid,
                    IdBuffer& out) {
    size_t before = out.size(), last = 0;
    for (size_t pos = 0; pos < valid;) {
        uint32_t ends[512];
        size_t start = pos;
        size_t count = bpe::Scanner::get(pattern, bpe::best_isa())(p, valid, pos, ends, 512);
        last = count > 1 ? ends[count - 2] : start;
    }
    encoder.encode_prefix(pattern, p, valid, last, out);
    size_t kept = out.size();
    if (valid > last) {
        auto blank = [&](uint32_t id) {
            Span s = vocab.bytes_of(id);
            for (size_t i = 0; i < s.size; i++)
                if (s.data[i] != ' ' && s.data[i] != '\n' && s.data[i] != '\t') return false;
            return true;
        };
        IdBuffer tail;
        encoder.encode_piece(p + last, valid - last, tail);
        if (blank(tail.data()[0]))
            while (kept > before && blank(out.data()[kept - 1])) last -= vocab.bytes_of(out.data()[--kept]).size;
        out.resize(kept);
    }
    encoder.encode_piece(p + last, n - last, out);
}

void encode_text(Engine& engine, Pattern pattern, const Text& text, IdBuffer& out) {
    GilRelease release(text.size() >= kReleaseBytes);
    Lease encoder(engine);
    size_t valid = text.is_str() ? text.size() : unicode::valid_utf8_prefix(text.data(), text.size());
    if (valid == text.size())
        encoder->encode(pattern, text.data(), text.size(), out);
    else
        encode_invalid(engine.vocab, *encoder.operator->(), pattern, text.data(), text.size(), valid, out);
}

PyObject* list_of(const IdBuffer& ids) {
    Ref list(PyList_New(static_cast<Py_ssize_t>(ids.size())));
    if (!list) throw PythonError{};
    for (size_t i = 0; i < ids.size(); i++) {
        PyObject* id = PyLong_FromUnsignedLong(ids.data()[i]);
        if (!id || PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), id) < 0) throw PythonError{};
    }
    return list.release();
}

// The one method that is called for texts of a few bytes: no argument tuple.
PyObject* encode(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        if (count != 2) {
            PyErr_SetString(PyExc_TypeError, "encode takes a text and a pattern");
            return nullptr;
        }
        long pattern = PyLong_AsLong(args[1]);
        if (pattern == -1 && PyErr_Occurred()) return nullptr;
        Text text(args[0]);
        IdBuffer ids;
        encode_text(engine_of(self), pattern_from(pattern), text, ids);
        return list_of(ids);
    });
}

PyObject* encode_array(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long pattern;
        if (!PyArg_ParseTuple(args, "Ol:encode_array", &object, &pattern)) return nullptr;
        Text text(object);
        IdBuffer ids;
        encode_text(engine_of(self), pattern_from(pattern), text, ids);
        return number_array(ids.data(), ids.size());
    });
}

PyObject* count(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long pattern;
        if (!PyArg_ParseTuple(args, "Ol:count", &object, &pattern)) return nullptr;
        Text text(object);
        IdBuffer ids;
        encode_text(engine_of(self), pattern_from(pattern), text, ids);
        return PyLong_FromSize_t(ids.size());
    });
}

PyObject* encode_batch(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long pattern;
        if (!PyArg_ParseTuple(args, "Ol:encode_batch", &object, &pattern)) return nullptr;
        Ref texts(PySequence_List(object));
        if (!texts) return nullptr;
        Py_ssize_t n = PyList_Size(texts.get());
        IdBuffer ids, ends;
        ends.push(0);
        std::vector<std::unique_ptr<Text>> views;
        views.reserve(static_cast<size_t>(n));
        for (Py_ssize_t i = 0; i < n; i++) views.push_back(std::make_unique<Text>(PyList_GetItem(texts.get(), i)));
        for (auto& text : views) {
            encode_text(engine_of(self), pattern_from(pattern), *text, ids);
            if (ids.size() > 0x7FFFFFFF)
                throw std::invalid_argument("texts: more than 2147483647 tokens in one batch; cu_seqlens is int32");
            ends.push(static_cast<uint32_t>(ids.size()));
        }
        Ref packed(number_array(ids.data(), ids.size())), offsets(number_array(ends.data(), ends.size()));
        if (!packed || !offsets) return nullptr;
        return PyTuple_Pack(2, packed.get(), offsets.get());
    });
}

PyObject* encode_pieces(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *object, *boundaries;
        if (!PyArg_ParseTuple(args, "OO:encode_pieces", &object, &boundaries)) return nullptr;
        Text text(object);
        Buffer ends(boundaries);
        size_t last = 0;
        for (size_t i = 0; i < ends.count(); last = ends.numbers()[i++])
            if (ends.numbers()[i] < last || ends.numbers()[i] > text.size())
                throw std::invalid_argument("ends must rise and stay within the text");
        IdBuffer ids;
        {
            GilRelease release(text.size() >= kReleaseBytes);
            Lease encoder(engine_of(self));
            encoder->encode_pieces(text.data(), text.size(), ends.numbers(), ends.count(), 0, ids);
        }
        return number_array(ids.data(), ids.size());
    });
}

PyObject* scan(PyObject*, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long pattern, isa;
        if (!PyArg_ParseTuple(args, "Oll:scan", &object, &pattern, &isa)) return nullptr;
        Text text(object);
        if (unicode::valid_utf8_prefix(text.data(), text.size()) != text.size())
            throw std::invalid_argument("text must be valid UTF-8");
        if (isa < 0 || isa > 3 || !bpe::has_isa(static_cast<Isa>(isa)))
            throw std::invalid_argument("isa: this machine has no instruction set number " + std::to_string(isa));
        auto function = bpe::Scanner::get(pattern_from(pattern), static_cast<Isa>(isa));
        constexpr size_t kEnds = 16384;
        IdBuffer ends;
        for (size_t pos = 0; pos < text.size();)
            ends.add(function(text.data(), text.size(), pos, ends.room(kEnds), kEnds));
        return number_array(ends.data(), ends.size());
    });
}

[[noreturn]] void bad_id(PyObject* id) {
    PyErr_SetObject(PyExc_KeyError, id);
    throw PythonError{};
}

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
        size_t total = 0;
        for (size_t i = 0; i < n; i++) {
            size_t size = vocab.bytes_of(ids[i]).size;
            if (!size) {
                Ref id(PyLong_FromUnsignedLong(ids[i]));
                bad_id(id.get());
            }
            total += size;
        }
        Ref bytes(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(total)));
        if (!bytes) return nullptr;
        char* to = PyBytes_AsString(bytes.get());
        for (size_t i = 0; i < n; i++) {
            Span s = vocab.bytes_of(ids[i]);
            std::memcpy(to, s.data, s.size);
            to += s.size;
        }
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

PyObject* new_engine(PyTypeObject* type, PyObject* args, PyObject*) {
    return guarded([&]() -> PyObject* {
        PyObject *tokens, *ids, *merge_list, *extra, *extra_ids;
        int whole;
        if (!PyArg_ParseTuple(args, "OOOpOO:Engine", &tokens, &ids, &merge_list, &whole, &extra, &extra_ids))
            return nullptr;
        auto spans_of = [](PyObject* list) {
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
        };
        auto engine = std::make_unique<Engine>();
        std::vector<Span> spans = spans_of(tokens), extra_spans = spans_of(extra);
        Buffer id_buffer(ids), extra_buffer(extra_ids);
        if (id_buffer.count() != spans.size() || extra_buffer.count() != extra_spans.size())
            throw std::invalid_argument("tokens and ids must be of one length");
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
        for (size_t i = 0; i < extra_spans.size(); i++) engine->vocab.add_special(extra_buffer.numbers()[i], extra_spans[i]);
        auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
        PyObject* self = alloc(type, 0);
        if (!self) return nullptr;
        reinterpret_cast<EngineObject*>(self)->engine = engine.release();
        return self;
    });
}

void free_engine(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    delete reinterpret_cast<EngineObject*>(self)->engine;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"encode", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(encode)), METH_FASTCALL,
     "encode(text, pattern) -> list of ids"},
    {"encode_array", encode_array, METH_VARARGS, "encode_array(text, pattern) -> bytearray of uint32"},
    {"encode_batch", encode_batch, METH_VARARGS, "encode_batch(texts, pattern) -> (uint32 ids, int32 offsets)"},
    {"encode_pieces", encode_pieces, METH_VARARGS, "encode_pieces(text, ends) -> bytearray of uint32"},
    {"count", count, METH_VARARGS, "count(text, pattern) -> number of ids"},
    {"scan", scan, METH_VARARGS, "scan(text, pattern, isa) -> ends of the pretokens, uint32"},
    {"decode", decode, METH_VARARGS, "decode(ids) -> bytes"},
    {"lengths", lengths, METH_O, "lengths(ids) -> bytes of each id, uint32"},
    {"token_id", token_id, METH_O, "token_id(bytes) -> id or None"},
    {"merges", merges, METH_NOARGS, "merges() -> (left, right, merged) ids in the order of rank, uint32"},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot type_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(new_engine)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_engine)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec type_spec = {"fastformer.tokenizer._bpe.Engine", sizeof(EngineObject), 0, Py_TPFLAGS_DEFAULT, type_slots};

}  // namespace

bool add_engine_type(PyObject* module) {
    Ref type(PyType_FromSpec(&type_spec));
    return type && PyModule_AddObjectRef(module, "Engine", type.get()) == 0;
}

}  // namespace fastformer::python
