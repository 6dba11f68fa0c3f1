// The CPU ops, each defined in the file of its name; `register.cpp` hands them to torch.
#pragma once

#include "rows.h"

namespace urlvr::cpu {

void statistics(ROW_ARGUMENTS, Tensor out);
void gradient(ROW_ARGUMENTS, Tensor stats, Tensor upstream, int64_t given, Tensor out, MaybeTensor bias_grad);
void policy(ROW_ARGUMENTS, Tensor loss, int64_t present, int64_t kind, int64_t kl, int64_t correction, std::vector<double> numbers, Tensor stats,
            Tensor out, MaybeTensor row_scale);
void loss_rows(Tensor advantages, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor old_logp, MaybeTensor ref_logp, MaybeTensor rollout_logp,
               MaybeTensor denominator, double number, MaybeTensor token_denominator, double token_number, int64_t weighing, Tensor lines,
               Tensor live, Tensor counts);
void join(MaybeTensor logp, Tensor cu_seqlens, MaybeTensor which, int64_t present, int64_t kind, int64_t correction, bool product,
          std::vector<double> numbers, Tensor lines);
void objective(Tensor logp, MaybeTensor entropy, MaybeTensor self_certainty, Tensor lines, Tensor live, Tensor counts, int64_t present,
               int64_t kind, int64_t kl, int64_t correction, std::vector<double> numbers, Tensor metrics, MaybeTensor upstream);
// Returns the row of a reward that counts and is no number, or −1; in the first case `out` is left unfinished.
int64_t advantages(Tensor rewards, Tensor group_ids, MaybeTensor mask, std::string scale, std::string baseline, double eps, Tensor out);

}  // namespace urlvr::cpu
