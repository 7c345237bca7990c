// What the parts of the binding share. Only CPython's limited API of 3.11 is used, so one binary serves every later
// Python; free-threaded builds, which have no limited API, compile the same sources.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "bpe/scanner.h"

namespace fastformer::python {

// Below this many bytes, giving the GIL away costs more than it gains.
inline constexpr size_t kReleaseBytes = 2048;

// An owned reference.
class Ref {
  public:
    explicit Ref(PyObject* p = nullptr) : p_(p) {}
    Ref(const Ref&) = delete;
    Ref& operator=(const Ref&) = delete;
    Ref(Ref&& o) noexcept : p_(o.release()) {}
    ~Ref() { Py_XDECREF(p_); }
    PyObject* get() const { return p_; }
    PyObject* release() {
        PyObject* p = p_;
        p_ = nullptr;
        return p;
    }
    void reset(PyObject* p) {
        Py_XDECREF(p_);
        p_ = p;
    }
    explicit operator bool() const { return p_ != nullptr; }

  private:
    PyObject* p_;
};

// Thrown where a Python error is already set.
struct PythonError {};

// Runs `body` and turns C++ exceptions into Python's.
template <typename Body>
PyObject* guarded(Body body) {
    try {
        return body();
    } catch (const PythonError&) {
    } catch (const std::invalid_argument& e) {
        PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
}

// The GIL is given away for the lifetime of this object, if `release`.
class GilRelease {
  public:
    explicit GilRelease(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
    GilRelease(const GilRelease&) = delete;
    GilRelease& operator=(const GilRelease&) = delete;
    ~GilRelease() {
        if (state_) PyEval_RestoreThread(state_);
    }

  private:
    PyThreadState* state_;
};

// A view of anything with the buffer protocol.
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(PyObject* object) {
        if (PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) < 0) throw PythonError{};
        held_ = true;
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (held_) PyBuffer_Release(&view_);
    }
    const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
    size_t size() const { return static_cast<size_t>(view_.len); }
    // The content as uint32 numbers; the copy is for buffers that are not aligned.
    const uint32_t* numbers() const { return reinterpret_cast<const uint32_t*>(view_.buf); }
    size_t count() const { return size() / 4; }

  private:
    Py_buffer view_{};
    bool held_ = false;
};

// The UTF-8 of a str, or the bytes of a buffer, without a copy. Surrogates in a str become what UTF-16 makes of them:
// pairs one character, lone ones U+FFFD.
class Text {
  public:
    explicit Text(PyObject* object);
    Text(const Text&) = delete;
    Text& operator=(const Text&) = delete;
    ~Text() {
        if (view_.obj) PyBuffer_Release(&view_);
    }
    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    bool is_str() const { return is_str_; }

  private:
    const uint8_t* data_ = nullptr;
    size_t size_ = 0;
    bool is_str_ = false;
    Py_buffer view_{};
    Ref replaced_;
};

bpe::Pattern pattern_from(long number);

// `count` uint32 numbers as a bytearray.
PyObject* number_array(const uint32_t* data, size_t count);

bool add_engine_type(PyObject* module);
bool add_trainer_type(PyObject* module);

}  // namespace fastformer::python
