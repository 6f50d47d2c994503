#define OUTDRAFT_ISA avx512_amx
#define OUTDRAFT_TILES
#include "simd/avx512.h"
// The kernels use the lanes above.
#include "kernels/table.h"
