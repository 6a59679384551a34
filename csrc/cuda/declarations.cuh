// Every kernel's host function.
#pragma once
#include "kernels.h"

namespace dfq {
namespace cuda {
#define DFQ_DECLARE(name, arguments) void name(const arguments&, const Queue&);
DFQ_KERNELS(DFQ_DECLARE)
#undef DFQ_DECLARE
}  // namespace cuda
}  // namespace dfq
