#define OUTDRAFT_ISA avx512
#include "simd/avx512.h"
// The kernels use the lanes above.
#include "kernels/table.h"
