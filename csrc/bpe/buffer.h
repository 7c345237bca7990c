// A growing array of ids that is never cleared before it is written.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastformer::bpe {

class IdBuffer {
  public:
    IdBuffer() = default;
    IdBuffer(const IdBuffer&) = delete;
    IdBuffer& operator=(const IdBuffer&) = delete;
    ~IdBuffer() { std::free(data_); }

    // Room for `extra` more ids; returns where they go.
    uint32_t* room(size_t extra) {
        if (size_ + extra > capacity_) grow(size_ + extra);
        return data_ + size_;
    }
    uint32_t* end() { return data_ + size_; }
    void add(size_t count) { size_ += count; }
    void push(uint32_t id) {
        *room(1) = id;
        size_++;
    }
    const uint32_t* data() const { return data_; }
    uint32_t* data() { return data_; }
    size_t size() const { return size_; }
    void resize(size_t size) { size_ = size; }
    // Empties the buffer, and gives back memory for more than `kept` ids.
    void reset(size_t kept) {
        size_ = 0;
        if (capacity_ <= kept) return;
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
    }
    // Gives the memory to the caller, who frees it with std::free; shortened to the ids it holds.
    uint32_t* release() {
        void* data = size_ ? std::realloc(data_, size_ * sizeof(uint32_t)) : nullptr;
        if (!size_) std::free(data_);
        else if (!data) data = data_;
        data_ = nullptr;
        size_ = capacity_ = 0;
        return static_cast<uint32_t*>(data);
    }

  private:
    void grow(size_t need) {
        size_t capacity = capacity_ + capacity_ / 2;
        if (capacity < need) capacity = need;
        if (capacity < 64) capacity = 64;
        void* data = std::realloc(data_, capacity * sizeof(uint32_t));
        if (!data) throw std::bad_alloc();
        data_ = static_cast<uint32_t*>(data);
        capacity_ = capacity;
    }
    uint32_t* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

}  // namespace fastformer::bpe
