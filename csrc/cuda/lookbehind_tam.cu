// Descents with TAM on CUDA.
#include "lookbehind_pass.cuh"

namespace torsion::cuda {

template void run_pass<DescentAscent<Tam, false>>(const CyclePass&);
template void run_pass<DescentAscent<Tam, true>>(const CyclePass&);
template void run_pass<Descent<Tam>>(const CyclePass&);
template void run_pass<DescentBlend<Tam>>(const CyclePass&);
template void run_closing<LastDescent<Tam>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cuda
