// Descents with TAM on a CPU.
#include "lookbehind_pass.h"

namespace torsion::cpu {

template void run_pass<DescentAscent<Tam, false>>(const CyclePass&);
template void run_pass<DescentAscent<Tam, true>>(const CyclePass&);
template void run_pass<Descent<Tam>>(const CyclePass&);
template void run_pass<DescentBlend<Tam>>(const CyclePass&);
template void run_closing<LastDescent<Tam>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cpu
