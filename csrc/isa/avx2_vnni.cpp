#define OUTDRAFT_ISA avx2_vnni
#include "simd/avx2.h"
// The kernels use the lanes above.
#include "kernels/table.h"
