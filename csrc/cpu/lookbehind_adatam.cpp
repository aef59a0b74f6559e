// Descents with AdaTAM and AdaTAMW on a CPU.
#include "lookbehind_pass.h"

namespace torsion::cpu {

template void run_pass<DescentAscent<AdaTam, false>>(const CyclePass&);
template void run_pass<DescentAscent<AdaTam, true>>(const CyclePass&);
template void run_pass<Descent<AdaTam>>(const CyclePass&);
template void run_pass<DescentBlend<AdaTam>>(const CyclePass&);
template void run_closing<LastDescent<AdaTam>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cpu
