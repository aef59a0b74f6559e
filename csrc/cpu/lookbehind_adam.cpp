// Descents with Adam and AdamW on a CPU.
#include "lookbehind_pass.h"

namespace torsion::cpu {

template void run_pass<DescentAscent<Adam, false>>(const CyclePass&);
template void run_pass<DescentAscent<Adam, true>>(const CyclePass&);
template void run_pass<Descent<Adam>>(const CyclePass&);
template void run_pass<DescentBlend<Adam>>(const CyclePass&);
template void run_closing<LastDescent<Adam>>(const CyclePass&, const CyclePass&);

}  // namespace torsion::cpu
