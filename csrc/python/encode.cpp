// Engine's methods that turn text into ids.
#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>

#include "bpe/unicode.h"
#include "python/engine.h"
#include "python/ids.h"
#include "python/texts.h"

namespace fastformer::python {

namespace {

using bpe::Encoder;
using bpe::IdBuffer;
using bpe::Isa;
using bpe::Pattern;
using bpe::Span;
using bpe::Vocab;

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

// Appends the ids of one text; without the GIL where that is worth it.
void encode_text(Engine& engine, Encoder& encoder, Pattern pattern, const Text& text, IdBuffer& out) {
    GilRelease release(text.size() >= kReleaseBytes);
    size_t valid = text.is_str() ? text.size() : unicode::valid_utf8_prefix(text.data(), text.size());
    if (valid == text.size())
        encoder.encode(pattern, text.data(), text.size(), out);
    else
        encode_invalid(engine.vocab, encoder, pattern, text.data(), text.size(), valid, out);
}

PyObject* encode_method(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "encode takes a text and a pattern");
        return nullptr;
    }
    long pattern = PyLong_AsLong(args[1]);
    if (pattern == -1 && PyErr_Occurred()) return nullptr;
    return encode_list(engine_of(self), pattern, args[0]);
}

PyObject* encode_array(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long pattern;
        if (!PyArg_ParseTuple(args, "Ol:encode_array", &object, &pattern)) return nullptr;
        Text text(object);
        IdBuffer ids;
        {
            Lease<true> encoder(engine_of(self));
            encode_text(engine_of(self), *encoder, pattern_from(pattern), text, ids);
        }
        return new_ids(object_of(self)->ids_type, ids);
    });
}

PyObject* count(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long pattern;
        if (!PyArg_ParseTuple(args, "Ol:count", &object, &pattern)) return nullptr;
        Text text(object);
        IdBuffer ids;
        Lease<true> encoder(engine_of(self));
        encode_text(engine_of(self), *encoder, pattern_from(pattern), text, ids);
        return PyLong_FromSize_t(ids.size());
    });
}

// The texts [low, high) of a batch: those that are valid together, the others each for itself.
void encode_range(Engine& engine, Encoder& encoder, Pattern pattern, const std::vector<Span>& texts,
                  const std::vector<bool>& checked, size_t low, size_t high, IdBuffer& ids, IdBuffer& counts) {
    for (size_t i = low; i < high;) {
        size_t end = i, valid = 0;
        for (; end < high; end++) {
            const Span& s = texts[end];
            valid = checked[end] ? s.size : unicode::valid_utf8_prefix(s.data, s.size);
            if (valid != s.size) break;
        }
        encoder.encode_many(pattern, texts.data() + i, end - i, ids, counts);
        if (end < high) {
            size_t before = ids.size();
            encode_invalid(engine.vocab, encoder, pattern, texts[end].data, texts[end].size, valid, ids);
            counts.push(static_cast<uint32_t>(ids.size() - before));
            end++;
        }
        i = end;
    }
}

PyObject* encode_batch(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject* object;
        long number;
        Py_ssize_t threads;
        if (!PyArg_ParseTuple(args, "Oln:encode_batch", &object, &number, &threads)) return nullptr;
        Pattern pattern = pattern_from(number);
        Texts texts(object);
        const std::vector<Span>& spans = texts.spans();
        size_t total = 0;
        for (const Span& s : spans) total += s.size;
        // A thread is worth starting for a quarter of a megabyte.
        size_t parts = std::min<size_t>(static_cast<size_t>(std::max<Py_ssize_t>(threads, 1)), total / (1 << 18) + 1);
        std::vector<IdBuffer> ids(parts), counts(parts);
        std::vector<std::exception_ptr> failed(parts);
        IdBuffer ends;
        Lease<true> own(engine_of(self));
        {
            GilRelease release(total >= kReleaseBytes);
            std::vector<size_t> cuts(parts + 1, spans.size());
            cuts[0] = 0;
            for (size_t i = 0, part = 1, seen = 0; i < spans.size() && part < parts; seen += spans[i++].size)
                if (seen >= total / parts * part) cuts[part++] = i;
            auto encode = [&](size_t part, Encoder& encoder) {
                encode_range(engine_of(self), encoder, pattern, spans, texts.checked(), cuts[part], cuts[part + 1], ids[part],
                             counts[part]);
            };
            auto work = [&](size_t part) {
                try {
                    part ? encode(part, *Lease<false>(engine_of(self))) : encode(0, *own);
                } catch (...) {
                    failed[part] = std::current_exception();
                }
            };
            std::vector<std::thread> running;
            running.reserve(parts);
            try {
                for (size_t part = 1; part < parts; part++) running.emplace_back(work, part);
            } catch (const std::system_error&) {
                // The system starts no more threads: this one does what is left.
                for (size_t part = running.size() + 1; part < parts; part++) work(part);
            }
            work(0);
            for (std::thread& thread : running) thread.join();
            for (auto& error : failed)
                if (error) std::rethrow_exception(error);
            size_t all = 0;
            for (const IdBuffer& part : ids) all += part.size();
            if (all > 0x7FFFFFFF)
                throw std::invalid_argument("texts: more than 2147483647 tokens in one batch; cu_seqlens is int32");
            ids[0].room(all - ids[0].size());
            for (size_t part = 1; part < parts; part++) {
                std::copy_n(ids[part].data(), ids[part].size(), ids[0].end());
                ids[0].add(ids[part].size());
                ids[part].reset(0);
            }
            uint32_t* to = ends.room(spans.size() + 1);
            *to++ = 0;
            for (const IdBuffer& part : counts)
                for (size_t i = 0; i < part.size(); i++, to++) *to = to[-1] + part.data()[i];
            ends.add(spans.size() + 1);
        }
        Ref packed(new_ids(object_of(self)->ids_type, ids[0])), offsets(new_ids(object_of(self)->ids_type, ends));
        if (!packed || !offsets) return nullptr;
        return PyTuple_Pack(2, packed.get(), offsets.get());
    });
}

PyObject* encode_pieces(PyObject* self, PyObject* args) {
    return guarded([&]() -> PyObject* {
        PyObject *object, *boundaries;
        if (!PyArg_ParseTuple(args, "OO:encode_pieces", &object, &boundaries)) return nullptr;
        Text text(object);
        if (!text.is_str() && unicode::valid_utf8_prefix(text.data(), text.size()) != text.size())
            throw std::invalid_argument("text must be valid UTF-8");
        Buffer ends(boundaries);
        size_t last = 0;
        for (size_t i = 0; i < ends.count(); last = ends.numbers()[i++])
            if (ends.numbers()[i] < last || ends.numbers()[i] > text.size())
                throw std::invalid_argument("ends must rise and stay within the text");
        IdBuffer ids;
        {
            Lease<true> encoder(engine_of(self));
            GilRelease release(text.size() >= kReleaseBytes);
            encoder->encode_pieces(text.data(), text.size(), ends.numbers(), ends.count(), 0, ids);
        }
        return new_ids(object_of(self)->ids_type, ids);
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

}  // namespace

PyObject* encode_list(Engine& engine, long pattern, PyObject* object) {
    return guarded([&]() -> PyObject* {
        Text text(object);
        Lease<true> encoder(engine);
        // A long text's ids would stay with the encoder.
        IdBuffer own;
        IdBuffer& ids = text.size() < (1 << 16) ? encoder->scratch() : own;
        encode_text(engine, *encoder, pattern_from(pattern), text, ids);
        Ref list(PyList_New(static_cast<Py_ssize_t>(ids.size())));
        if (!list) throw PythonError{};
        for (size_t i = 0; i < ids.size(); i++) {
            PyObject* id = engine.number(ids.data()[i]);
            if (!id || PyList_SetItem(list.get(), static_cast<Py_ssize_t>(i), id) < 0) throw PythonError{};
        }
        return list.release();
    });
}

PyMethodDef encode_methods[] = {
    {"encode", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(encode_method)), METH_FASTCALL,
     "encode(text, pattern) -> list of ids"},
    {"encode_array", encode_array, METH_VARARGS, "encode_array(text, pattern) -> buffer of uint32"},
    {"encode_batch", encode_batch, METH_VARARGS, "encode_batch(texts, pattern, threads) -> (uint32 ids, int32 offsets)"},
    {"encode_pieces", encode_pieces, METH_VARARGS, "encode_pieces(text, ends) -> buffer of uint32"},
    {"count", count, METH_VARARGS, "count(text, pattern) -> number of ids"},
    {"scan", scan, METH_VARARGS, "scan(text, pattern, isa) -> ends of the pretokens, uint32"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace fastformer::python
