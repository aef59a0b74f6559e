// One step's scalars: from the sums of the chunks to the coefficients of each tensor. Both runners use these functions;
// they differ only in who calls them (one thread on a CPU, one block on a GPU).
#pragma once
#include "engine/plan.h"
#include "engine/types.h"

namespace torsion {

template <class Rule>
struct Frame {
  static constexpr int N = Rule::n_sums;
  static constexpr int C = n_numbers<typename Rule::template Coefficients<double>>;
  static constexpr int H = n_numbers<typename Rule::Hyper>;
  static constexpr int K = n_numbers<typename Rule::Shared>;
  using Coefficients = typename Rule::template Coefficients<double>;

  const Row* rows;
  const Piece* pieces;
  const int32_t* scope_first;
  int32_t n_rows, n_scopes;
  double* partial;             // [pieces][N]
  double* row_sums;            // [rows][N]
  double* sums;                // [scopes + 1][N]; the last row is over every tensor
  Coefficients* coefficients;  // [rows]
  const typename Rule::Hyper* hyper;
  void* shared;  // [scopes][K], float or double
  bool shared_is_double;
  float* steps;  // [tensors]
  Status* status;
  const float* grad_scale;     // null: 1
  const float* found_inf;      // null: 0
  double max_norm;             // infinity: no clipping
  double* after;               // [pieces][sums of the rule After], which update fills
  const NoiseMap* noise;       // of DemP: the table's
  const double* perturbation;  // of DemP: lambda, sigma and the step that the noise belongs to
  uint64_t noise_seed;
  bool opens;  // of several passes that are skipped together this is the first, or there is one only
  Slots slots;

  TORSION_HD double scale() const { return grad_scale ? 1 / double(*grad_scale) : 1.; }

  // Factor of the raw gradient at its load, in both passes.
  TORSION_HD double pre(const Row& row, double inverse_scale) const {
    return hyper[row.group].maximize != 0 ? -inverse_scale : inverse_scale;
  }

  // What reduce() is told of a row.
  template <class R>
  TORSION_HD typename Rule::template Known<R> known(const Row& row) const {
    if constexpr (Rule::kDemp)
      return Rule::template known_lasso<R>(lasso(row));
    else
      return Rule::template known<R>(hyper[row.group], row.scaled != 0);
  }
  TORSION_HD double lasso(const Row& row) const { return row.scaled ? perturbation[0] : 0.; }

  TORSION_HD bool first_step(const Row& row) const { return Rule::clones(hyper[row.group]) && steps[row.tensor] == 0; }

  // A tensor that only seeds its momentum stays out of its scope's cosine, not out of the norm and the finiteness check.
  TORSION_HD bool counts_in_scope(const Row& row) const { return !first_step(row); }

  TORSION_HD void decide() {
    const double* all = sums + int64_t(n_scopes) * N;
    bool finite = true;
    for (int k = 0; k < N; ++k) finite = finite && std::isfinite(all[k]);
    if (!opens && status->skip != kGo) {
      status->skip = kSkippedBefore;
      return;
    }
    const bool skip = !finite || (found_inf && *found_inf != 0);
    if constexpr (Rule::kGradNorm2 >= 0) {
      double norm = std::sqrt(all[Rule::kGradNorm2]);
      if (skip && std::isfinite(norm)) norm = HUGE_VAL;
      const double clip = max_norm / (norm + 1e-6);
      status->grad_norm = norm;
      status->clip = clip < 1 ? clip : 1.;
    }
    status->skip = skip ? kSkip : kGo;
    status->skipped += skip;
  }

  TORSION_HD void advance(int32_t scope) {
    if (scope_first[scope] == scope_first[scope + 1]) return;  // none of its tensors has a gradient
    const Row& row = rows[scope_first[scope]];
    const Totals totals{sums + int64_t(scope) * N, sums + int64_t(n_scopes) * N};
    typename Rule::Shared s = shared_of(scope);
    Rule::advance(s, totals, hyper[row.group]);
    double now[K ? K : 1] = {};
    memcpy(now, &s, sizeof s);
    for (int k = 0; k < K; ++k) store_shared(scope, k, now[k]);
  }

  TORSION_HD void set_coefficients(int32_t t) {
    const Row& row = rows[t];
    const bool first = first_step(row);
    if constexpr (Rule::kCounts) steps[row.tensor] += 1;
    Site site{double(steps[row.tensor]), status->clip, first, row.scaled != 0, sums + int64_t(n_scopes) * N};
    if constexpr (Rule::kDemp) {
      site.lasso = lasso(row);
      site.sigma = row.noise ? perturbation[1] : 0.;
    }
    // The scope's state is read back, so that float32 state gives after a resume what it gave before.
    coefficients[t] = Rule::template coefficients<double>(shared_of(row.scope), hyper[row.group], site);
  }

  TORSION_HD typename Rule::Shared shared_of(int32_t scope) const {
    double now[K ? K : 1] = {};
    for (int k = 0; k < K; ++k) now[k] = load_shared(scope, k);
    typename Rule::Shared s;
    memcpy(&s, now, sizeof s);
    return s;
  }

  TORSION_HD double load_shared(int32_t scope, int k) const {
    const int64_t i = int64_t(scope) * K + k;
    return shared_is_double ? static_cast<const double*>(shared)[i] : double(static_cast<const float*>(shared)[i]);
  }
  TORSION_HD void store_shared(int32_t scope, int k, double x) const {
    const int64_t i = int64_t(scope) * K + k;
    if (shared_is_double)
      static_cast<double*>(shared)[i] = x;
    else
      static_cast<float*>(shared)[i] = float(x);
  }
};

}  // namespace torsion
