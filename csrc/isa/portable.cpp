#define OUTDRAFT_ISA portable
#include "simd/portable.h"
// The kernels use the lanes above.
#include "kernels/table.h"
