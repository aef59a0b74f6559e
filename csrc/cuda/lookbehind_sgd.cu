// Descents with SGD on CUDA.
#include "lookbehind_pass.cuh"

namespace torsion::cuda {

template void run_pass<DescentAscent<Sgd<false>, false>>(const CyclePass&);
template void run_pass<DescentAscent<Sgd<false>, true>>(const CyclePass&);
template void run_pass<Descent<Sgd<false>>>(const CyclePass&);
template void run_pass<DescentBlend<Sgd<false>>>(const CyclePass&);
template void run_closing<LastDescent<Sgd<false>>>(const CyclePass&, const CyclePass&);
template void run_pass<DescentAscent<Sgd<true>, false>>(const CyclePass&);
template void run_pass<DescentAscent<Sgd<true>, true>>(const CyclePass&);
template void run_pass<Descent<Sgd<true>>>(const CyclePass&);
template void run_pass<DescentBlend<Sgd<true>>>(const CyclePass&);
template void run_closing<LastDescent<Sgd<true>>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cuda
