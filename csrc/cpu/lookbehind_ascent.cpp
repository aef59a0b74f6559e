// Ascent and interpolation on a CPU.
#include "lookbehind_pass.h"

namespace torsion::cpu {

template void run_pass<Ascent<false, true>>(const CyclePass&);
template void run_pass<Ascent<true, true>>(const CyclePass&);
template void run_pass<Ascent<false, false>>(const CyclePass&);
template void run_pass<Ascent<true, false>>(const CyclePass&);
template void run_pass<Blend<false>>(const CyclePass&);
template void run_pass<Blend<true>>(const CyclePass&);

}  // namespace torsion::cpu
