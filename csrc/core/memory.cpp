#include "core/memory.h"

#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace outdraft {
namespace {

constexpr std::size_t kLine = 128;

std::size_t up(std::size_t x, std::size_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// With a sanitizer each piece has its own guarded block, so that reading past it is seen.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

constexpr std::size_t kLargePage = 2 << 20;
constexpr std::size_t kMapping = 64 << 20;  // of address space: a page is there once it is touched

struct Mapping {
  void* base;
  std::size_t mapped;
  uint8_t* next;  // behind the last piece
  uint8_t* end;

  explicit Mapping(std::size_t bytes) : mapped(bytes + kLargePage) {
    base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    next = reinterpret_cast<uint8_t*>(up(reinterpret_cast<std::uintptr_t>(base), kLargePage));
    end = next + bytes;
    madvise(next, bytes, MADV_HUGEPAGE);
  }
  ~Mapping() { munmap(base, mapped); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::size_t room() const { return end - next; }
};

std::mutex lock;
std::weak_ptr<Mapping> latest;  // the one with the most room left

#endif

}  // namespace

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

Piece take_memory(std::size_t bytes) {
  const std::size_t size = up(bytes, kLine);
  const std::lock_guard guard(lock);
  std::shared_ptr<Mapping> mapping = latest.lock();
  if (!mapping || mapping->room() < size) {
    const std::size_t room = mapping ? mapping->room() : 0;
    mapping = std::make_shared<Mapping>(up(size > kMapping ? size : kMapping, kLargePage));
    if (mapping->room() - size >= room) latest = mapping;
  }
  uint8_t* data = mapping->next;
  mapping->next += size;
  return {data, mapping};
}

#else

Piece take_memory(std::size_t bytes) {
  constexpr std::align_val_t kAlign{kLine};
  auto* data = static_cast<uint8_t*>(::operator new(up(bytes, kLine), kAlign));
  for (std::size_t i = 0; i < up(bytes, kLine); ++i) data[i] = 0;
  return {data, std::shared_ptr<void>(data, [=](void* p) { ::operator delete(p, kAlign); })};
}

#endif

}  // namespace outdraft
