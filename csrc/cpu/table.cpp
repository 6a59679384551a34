// One instruction-set level's kernels as a table.
#include "kernels.h"

#define DFQ_TEXT_OF(name) #name
#define DFQ_TEXT(name) DFQ_TEXT_OF(name)

namespace dfq {
namespace DFQ_ISA {

extern const CpuKernels table;
const CpuKernels table = {
    DFQ_TEXT(DFQ_ISA),
#define DFQ_ENTRY(name, arguments) name,
    DFQ_KERNELS(DFQ_ENTRY)
#undef DFQ_ENTRY
    prepare_program,
    run_program,
    fake_quant_conv2d,
};

}  // namespace DFQ_ISA
}  // namespace dfq
