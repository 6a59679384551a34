// The CPU kernels: one table of functions per instruction-set level.
#pragma once
#include "../common/arguments.h"
#include "program.h"

namespace dfq {

struct CpuKernels {
  const char* isa;
#define DFQ_FIELD(name, arguments) void (*name)(const arguments&);
  DFQ_KERNELS(DFQ_FIELD)
#undef DFQ_FIELD
  void (*prepare_program)(Program&);  // packs weights the way this level multiplies
  void (*run_program)(const ProgramRun&);
  void (*fake_quant_conv2d)(const FakeQuantConv2d&);
};

// The best table that this processor can run.
const CpuKernels& cpu_kernels();

#ifdef DFQ_ISA
namespace DFQ_ISA {
#define DFQ_DECLARE(name, arguments) void name(const arguments&);
DFQ_KERNELS(DFQ_DECLARE)
#undef DFQ_DECLARE
void prepare_program(Program& program);
void run_program(const ProgramRun& run);
void fake_quant_conv2d(const FakeQuantConv2d& arguments);
// A program of one convolution to real results; its image is in its plane.
void convolve_image(const Program& program, uint8_t* arena, float* out);
}  // namespace DFQ_ISA
#endif

}  // namespace dfq
