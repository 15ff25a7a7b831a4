// Memory on cache-line boundaries, owned.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace i2f {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

inline std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

struct FreeAligned {
    void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

// Uninitialised; throws std::bad_alloc.
template <class T>
Aligned<T> allocate(std::size_t count) {
    void* memory = std::aligned_alloc(kAlignment, round_up(count * sizeof(T) + 1, kAlignment));
    if (memory == nullptr) throw std::bad_alloc();
    return Aligned<T>(static_cast<T*>(memory));
}

// Scratch of one thread: grows to the largest call and stays, so that a click allocates nothing.
class Arena {
public:
    std::byte* get(std::size_t bytes) {
        if (bytes > size_) {
            memory_.reset();
            size_ = 0;
            memory_ = allocate<std::byte>(bytes);
            size_ = bytes;
        }
        return memory_.get();
    }

private:
    Aligned<std::byte> memory_;
    std::size_t size_ = 0;
};

}  // namespace i2f
