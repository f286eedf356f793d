//! `topk_routing`: logits [T, outputs] to `topk_ids` i32 [T, k] and `topk_weights` f32 [T, k].
//!
//! Ids come in descending order of the key, ties to the lower id. Exact, except where a score's
//! `exp` differs in its last bits: then keys closer than that may change places, and weights are Bounded.
//! A token id outside of the hash table gives ids -2 and NaN weights; `combine` makes its row NaN.

use super::{Arguments, PARAMS, Source, Value, read, shader, write};
use crate::error::Result;
use crate::numerics::{self, order_key};
use crate::spec::{ChosenScore, Denominator, GroupScore, Groups, NanPolicy, RoutingMethod, Score, SelectionKey};

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct TopkRouting {
    /// Width of the logits.
    pub router_outputs: usize,
    /// k.
    pub top_k: usize,
    /// Score and selection; one that `lower` accepts.
    pub method: RoutingMethod,
    /// Renormalisation; not the p-norm.
    pub renormalize: Option<Denominator>,
    /// rho if it acts in the weights, else 1.
    pub weight_scale: f32,
    /// What a score that is not finite does.
    pub nan_policy: NanPolicy,
}

/// The method taken apart as the kernel's slots have it.
struct Parts {
    score: Score,
    key: SelectionKey,
    groups: Option<Groups>,
    chosen: Option<ChosenScore>,
    vocab_size: Option<usize>,
}

impl TopkRouting {
    fn parts(&self) -> Parts {
        let plain = |score| Parts { score, key: SelectionKey::Score, groups: None, chosen: None, vocab_size: None };
        match self.method {
            RoutingMethod::TopK { score, key, groups } => Parts { key, groups, ..plain(score) },
            RoutingMethod::TopKThenScore { score } => Parts { chosen: Some(score), ..plain(Score::Identity) },
            RoutingMethod::Hash { score, vocab_size } => Parts { vocab_size: Some(vocab_size), ..plain(score) },
            // `lower` refuses these by name before a kernel is made.
            RoutingMethod::JointNorm { num_shared: _, global_scale: _ }
            | RoutingMethod::Sparsemixer { router_jitter_noise: _ } => plain(Score::Identity),
        }
    }

    /// Scores, keys, the chosen, two words a group, and the softmax's three scans.
    pub(super) fn workgroup_bytes(&self) -> usize {
        let groups = self.parts().groups.map_or(0, |groups| groups.n_group);
        4 * (2 * self.router_outputs + self.top_k + 2 * groups + 3 * 64)
    }

    pub(super) fn source(&self) -> Source {
        let Parts { score, key, groups, chosen, vocab_size } = self.parts();
        let mut constants = vec![
            ("ROUTER_OUTPUTS", Value::U32(self.router_outputs as u32)),
            ("TOP_K", Value::U32(self.top_k as u32)),
            ("ROUTED_SCALING_FACTOR", Value::F32(self.weight_scale)),
            ("NAN_PROPAGATES", Value::Bool(self.nan_policy == NanPolicy::Propagate)),
        ];
        let mut bindings = vec![
            PARAMS,
            read("logits", "array<f32>"),
            write("topk_ids", "array<i32>"),
            write("topk_weights", "array<u32>"),
        ];
        let mut fragments = vec![shader!("fragments/params.wgsl"), shader!("fragments/order_key.wgsl")];
        if score == Score::Sigmoid || chosen == Some(ChosenScore::Sigmoid) {
            fragments.push(shader!("fragments/sigmoid.wgsl"));
        }
        fragments.push(match chosen {
            Some(ChosenScore::Softmax) => shader!("fragments/score_chosen_softmax.wgsl"),
            Some(ChosenScore::Sigmoid) => shader!("fragments/score_chosen_sigmoid.wgsl"),
            None => match score {
                Score::Softmax => shader!("fragments/score_softmax.wgsl"),
                Score::Sigmoid => shader!("fragments/score_sigmoid.wgsl"),
                Score::SqrtSoftplus => shader!("fragments/score_sqrt_softplus.wgsl"),
                Score::Identity => shader!("fragments/score_identity.wgsl"),
            },
        });
        let selection_bias = read("selection_bias", "array<f32>");
        match key {
            SelectionKey::Score => fragments.push(shader!("fragments/key_score.wgsl")),
            SelectionKey::ScorePlusBias => {
                bindings.push(selection_bias);
                fragments.push(shader!("fragments/key_score_plus_bias.wgsl"));
            }
            SelectionKey::LogitPlusBias => {
                bindings.push(selection_bias);
                fragments.push(shader!("fragments/key_logit_plus_bias.wgsl"));
            }
        }
        match vocab_size {
            Some(vocab_size) => {
                constants.push(("VOCAB_SIZE", Value::U32(vocab_size as u32)));
                bindings.extend([read("token_ids", "array<u32>"), read("tid2eid", "array<i32>")]);
                fragments.push(shader!("fragments/select_hash.wgsl"));
            }
            None => {
                match groups {
                    None => fragments.push(shader!("fragments/groups_none.wgsl")),
                    Some(Groups { n_group, topk_group, score }) => {
                        constants.push(("N_GROUP", Value::U32(n_group as u32)));
                        constants.push(("TOPK_GROUP", Value::U32(topk_group as u32)));
                        fragments.push(match score {
                            GroupScore::Top2SumOfKey => shader!("fragments/group_score_top2_sum_of_key.wgsl"),
                            GroupScore::Top2SumOfScore => shader!("fragments/group_score_top2_sum_of_score.wgsl"),
                            GroupScore::MaxOfScore => shader!("fragments/group_score_max_of_score.wgsl"),
                        });
                        fragments.push(shader!("fragments/groups_best.wgsl"));
                    }
                }
                fragments.push(shader!("fragments/select_rank.wgsl"));
            }
        }
        fragments.push(match chosen {
            None => shader!("fragments/weigh_scores.wgsl"),
            Some(ChosenScore::Softmax) => shader!("fragments/weigh_softmax.wgsl"),
            Some(ChosenScore::Sigmoid) => shader!("fragments/weigh_sigmoid.wgsl"),
        });
        fragments.push(match self.renormalize {
            // `lower` refuses the p-norm by name.
            None | Some(Denominator::PNorm { p: _ }) => shader!("fragments/renormalize_none.wgsl"),
            Some(Denominator::Sum) => shader!("fragments/renormalize_sum.wgsl"),
            Some(Denominator::SumPlus { eps }) => {
                constants.push(("RENORMALIZE_EPS", Value::F32(eps)));
                shader!("fragments/renormalize_sum_plus.wgsl")
            }
            Some(Denominator::AtLeast { floor }) => {
                constants.push(("RENORMALIZE_FLOOR", Value::F32(floor)));
                shader!("fragments/renormalize_at_least.wgsl")
            }
            Some(Denominator::SumOrOne) => shader!("fragments/renormalize_sum_or_one.wgsl"),
        });
        fragments.push(shader!("topk_routing/select.wgsl"));
        Source { constants, bindings, fragments }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let tokens = arguments.tokens()?;
        let logits = arguments.read_f32("logits")?;
        let parts = self.parts();
        let bias = match parts.key {
            SelectionKey::Score => None,
            SelectionKey::ScorePlusBias | SelectionKey::LogitPlusBias => Some(arguments.read_f32("selection_bias")?),
        };
        let hash = match parts.vocab_size {
            None => None,
            Some(_) => Some((arguments.read("token_ids")?, arguments.read_i32("tid2eid")?)),
        };
        let topk_ids = arguments.write("topk_ids")?;
        let topk_weights = arguments.write("topk_weights")?;
        for token in 0..tokens {
            let logits = &logits[token * self.router_outputs..][..self.router_outputs];
            let ids = &mut topk_ids[token * self.top_k..][..self.top_k];
            let weights = &mut topk_weights[token * self.top_k..][..self.top_k];
            let scores = match parts.chosen {
                None => score_row(parts.score, logits),
                // The logits themselves are compared; whether their score will be finite decides.
                Some(ChosenScore::Softmax) => {
                    logits.iter().map(|&l| Some(l).filter(|l| !l.is_nan() && *l < f32::INFINITY)).collect()
                }
                Some(ChosenScore::Sigmoid) => logits.iter().map(|&l| Some(l).filter(|l| !l.is_nan())).collect(),
            };
            let key = |e: usize| {
                let score = scores[e]?;
                let key = match parts.key {
                    SelectionKey::Score => score,
                    SelectionKey::ScorePlusBias => score + bias.map_or(0.0, |bias| bias[e]),
                    SelectionKey::LogitPlusBias => logits[e] + bias.map_or(0.0, |bias| bias[e]),
                };
                (!key.is_nan()).then_some(key)
            };
            let keys: Vec<u32> = (0..logits.len()).map(|e| key(e).map_or(0, order_key)).collect();
            let chosen: Vec<usize> = match hash {
                None => select(&keys, &scores, parts.groups, self.top_k),
                Some((token_ids, tid2eid)) => {
                    let row = token_ids[token] as usize;
                    if parts.vocab_size.is_none_or(|vocab_size| row >= vocab_size) {
                        ids.fill(-2i32 as u32);
                        weights.fill(f32::NAN.to_bits());
                        continue;
                    }
                    tid2eid[row * self.top_k..][..self.top_k].iter().map(|&id| id as usize).collect()
                }
            };
            let values: Vec<Option<f32>> =
                chosen.iter().map(|&e| if keys[e] == 0 { None } else { scores[e] }).collect();
            let values = weigh(parts.chosen, &values);
            for ((id, weight), (e, value)) in ids.iter_mut().zip(weights).zip(chosen.iter().zip(self.scaled(&values))) {
                *id = *e as u32;
                *weight = value.to_bits();
            }
        }
        Ok(())
    }

    /// Renormalised and scaled; `None` is a score that is not finite.
    fn scaled(&self, values: &[Option<f32>]) -> Vec<f32> {
        let numbers: Vec<f32> = values.iter().map(|value| value.unwrap_or(0.0)).collect();
        let divisor = self.renormalize.map_or(1.0, |rule| numerics::denominator(rule, &numbers));
        let spoiled = self.renormalize.is_some() && values.contains(&None);
        let weight = |(value, number): (&Option<f32>, &f32)| {
            if self.nan_policy == NanPolicy::Propagate && (value.is_none() || spoiled) {
                return f32::NAN;
            }
            (if divisor == 0.0 { 0.0 } else { number / divisor }) * self.weight_scale
        };
        values.iter().zip(&numbers).map(weight).collect()
    }
}

/// Scores, `None` where not finite. Twin: shaders/fragments/score_*.wgsl
fn score_row(score: Score, logits: &[f32]) -> Vec<Option<f32>> {
    let each = |f: fn(f32) -> f32| logits.iter().map(|&l| Some(f(l)).filter(|s| s.is_finite())).collect();
    match score {
        Score::Identity => each(|l| l),
        Score::Sigmoid => each(numerics::sigmoid),
        Score::SqrtSoftplus => each(numerics::sqrt_softplus),
        Score::Softmax => {
            let spoiled = logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY);
            let largest = logits
                .iter()
                .copied()
                .filter(|l| l.is_finite())
                .fold(None, |largest: Option<f32>, l| Some(largest.map_or(l, |largest| largest.max(l))));
            let Some(largest) = largest.filter(|_| !spoiled) else { return vec![None; logits.len()] };
            let exps: Vec<f32> = logits.iter().map(|l| (l - largest).exp()).collect();
            let sum: f32 = exps.iter().sum();
            exps.iter().map(|e| Some(e / sum)).collect()
        }
    }
}

/// Ranks by counting, as the kernel does.
fn select(keys: &[u32], scores: &[Option<f32>], groups: Option<Groups>, top_k: usize) -> Vec<usize> {
    let best = |keys: &[Option<u32>], count: usize| {
        let mut chosen = vec![0; count];
        for (e, key) in keys.iter().enumerate().filter(|(_, key)| key.is_some()) {
            let before = |(other, k): (usize, &Option<u32>)| k.is_some() && (k > key || (k == key && other < e));
            let rank = keys.iter().enumerate().filter(|&entry| before(entry)).count();
            if let Some(slot) = chosen.get_mut(rank) {
                *slot = e;
            }
        }
        chosen
    };
    let Some(Groups { n_group, topk_group, score }) = groups else {
        return best(&keys.iter().copied().map(Some).collect::<Vec<_>>(), top_k);
    };
    let size = keys.len() / n_group;
    let judge = |group: usize| {
        let mut two = [(0u32, 0f32); 2];
        for e in group * size..(group + 1) * size {
            let value = scores[e].unwrap_or(0.0);
            let member = match score {
                GroupScore::Top2SumOfKey => (keys[e], from_order_key(keys[e])),
                GroupScore::Top2SumOfScore | GroupScore::MaxOfScore => {
                    (if keys[e] == 0 { 0 } else { order_key(value) }, value)
                }
            };
            if member.0 > two[0].0 {
                two = [member, two[0]];
            } else if member.0 > two[1].0 {
                two[1] = member;
            }
        }
        match score {
            GroupScore::MaxOfScore => two[0].0,
            GroupScore::Top2SumOfKey | GroupScore::Top2SumOfScore => {
                let sum = two[0].1 + two[1].1;
                if two[1].0 == 0 || sum.is_nan() { 0 } else { order_key(sum) }
            }
        }
    };
    let judged: Vec<Option<u32>> = (0..n_group).map(|group| Some(judge(group))).collect();
    let kept = best(&judged, topk_group);
    let allowed: Vec<Option<u32>> =
        keys.iter().enumerate().map(|(e, key)| kept.contains(&(e / size)).then_some(*key)).collect();
    best(&allowed, top_k)
}

/// The number behind an [`order_key`].
fn from_order_key(key: u32) -> f32 {
    f32::from_bits(if key & 0x8000_0000 == 0 { !key } else { key ^ 0x8000_0000 })
}

/// Scores of the chosen. Twin: shaders/fragments/weigh_*.wgsl
fn weigh(chosen: Option<ChosenScore>, values: &[Option<f32>]) -> Vec<Option<f32>> {
    match chosen {
        None => values.to_vec(),
        Some(ChosenScore::Sigmoid) => values.iter().map(|value| value.map(numerics::sigmoid)).collect(),
        Some(ChosenScore::Softmax) => {
            let largest = values.iter().flatten().copied().fold(f32::MIN, f32::max);
            let exps: Vec<Option<f32>> = values.iter().map(|value| value.map(|l| (l - largest).exp())).collect();
            let sum: f32 = exps.iter().flatten().sum();
            // Only -inf was chosen: no weight at all.
            exps.iter().map(|e| e.map(|e| if sum == 0.0 { 0.0 } else { e / sum })).collect()
        }
    }
}
