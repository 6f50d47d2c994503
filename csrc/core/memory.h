// Memory for weights and keys: zeroed, in large pages, piece after piece.
//
// A weight of a few megabytes with a mapping of its own would lie mostly in small pages, and reading
// them takes up to half as long again where addresses are translated twice (virtual machines).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace outdraft {

// Part of a mapping, which lasts as long as any of its pieces.
struct Piece {
  uint8_t* data;
  std::shared_ptr<void> mapping;
};

// Zeroed memory aligned to two cache lines. Throws std::bad_alloc when there is none.
Piece take_memory(std::size_t bytes);

}  // namespace outdraft
