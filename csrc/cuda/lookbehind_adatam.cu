// Descents with AdaTAM and AdaTAMW on CUDA.
#include "lookbehind_pass.cuh"

namespace torsion::cuda {

template void run_pass<DescentAscent<AdaTam, false>>(const CyclePass&);
template void run_pass<DescentAscent<AdaTam, true>>(const CyclePass&);
template void run_pass<Descent<AdaTam>>(const CyclePass&);
template void run_pass<DescentBlend<AdaTam>>(const CyclePass&);
template void run_closing<LastDescent<AdaTam>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cuda
