// Descents with Adam and AdamW on CUDA.
#include "lookbehind_pass.cuh"

namespace torsion::cuda {

template void run_pass<DescentAscent<Adam, false>>(const CyclePass&);
template void run_pass<DescentAscent<Adam, true>>(const CyclePass&);
template void run_pass<Descent<Adam>>(const CyclePass&);
template void run_pass<DescentBlend<Adam>>(const CyclePass&);
template void run_closing<LastDescent<Adam>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cuda
