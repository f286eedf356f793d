//! One run against the reference.

use moewe::host::Outcome;
use moewe::reference::{self, Inputs, Routed};
use moewe::spec::{ExpertMlp, Router, SharedExperts};
use moewe::{MoeSpec, MoeWeights, Result, RouterWeights};

use crate::inputs::RandomTokens;
use crate::metrics;
use crate::reference_engine::{layer, route, tokens_share_scales};

/// Backends sum in another order than the reference, which sums in f64: f32 sums of a few thousand
/// random terms lie below 1e-6 relative, far from what a dropped field does (calc_diff beyond 1e-4).
const OUTPUT_CALC_DIFF: f64 = 1e-5;
/// Of one row, so that no single row hides in the sum over all: three digits, a thousand times
/// the rounding above, since a row may cancel.
const OUTPUT_ROW_RELATIVE: f64 = 1e-3;
/// A hundred f32 roundings of a weight, for the logits' sums and the exponential's error on GPUs.
const WEIGHTS: f64 = 1e-5;
/// Two selections are a near tie if logits that move by this much, relative, exchange them: the
/// error that the sum of a logit may have.
const NEAR_TIE: f32 = 1e-5;
/// Multiply-adds that the reference may spend on experts: seconds.
const BUDGET: usize = if cfg!(debug_assertions) { 150_000_000 } else { 3_000_000_000 };

/// How far a run is from the reference.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Tokens whose experts are not the reference's.
    pub wrong_tokens: usize,
    /// Tokens whose experts are not the reference's because two are as good: compared no further.
    pub near_ties: usize,
    /// Tokens whose output was compared.
    pub checked_tokens: usize,
    /// Of tokens with the same experts.
    pub measures: Vec<Measure>,
}

/// One error and its bound.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// What was measured.
    pub name: &'static str,
    /// The error.
    pub error: f64,
    /// Its bound.
    pub tolerance: f64,
}

impl Measure {
    /// Whether the error is within its bound; NaN is not.
    pub fn holds(&self) -> bool {
        self.error <= self.tolerance
    }
}

impl Comparison {
    /// Why the run is wrong.
    pub fn complaint(&self) -> Option<String> {
        let mut complaints = vec![];
        if self.wrong_tokens > 0 {
            complaints.push(format!("topk_ids: {} tokens have other experts than the reference's", self.wrong_tokens));
        }
        if self.checked_tokens == 0 {
            complaints.push("output: no token could be compared".into());
        }
        for measure in self.measures.iter().filter(|measure| !measure.holds()) {
            let Measure { name, error, tolerance } = measure;
            complaints.push(format!("{name}: error {error:.3e}, expected at most {tolerance:.3e}"));
        }
        (!complaints.is_empty()).then(|| complaints.join("; "))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Experts {
    Same,
    NearTie,
    Wrong,
}

/// Compares ids and weights of all tokens, and the output of as many as the reference computes in seconds; of all
/// where they share scales.
///
/// # Errors
/// Those of the reference.
pub fn compare(
    spec: &MoeSpec,
    weights: &MoeWeights<'_>,
    tokens: &RandomTokens,
    count: usize,
    outcome: &Outcome,
) -> Result<Comparison> {
    let inputs = tokens.first(count, spec);
    let routed = route(spec, &weights.router, &inputs)?;
    let found = Slots::of(&outcome.topk_ids, &outcome.topk_weights, spec.top_k);
    let expected = Slots::of(&routed.topk_ids, &routed.topk_weights, spec.top_k);
    let judged: Vec<Experts> = (0..count)
        .map(|token| judge(spec, &weights.router, &inputs, &routed, token, [found.ids(token), expected.ids(token)]))
        .collect::<Result<_>>()?;
    let of = |kind: Experts| judged.iter().filter(|judged| **judged == kind).count();
    let same = |tokens: usize| (0..tokens).filter(|token| judged.get(*token) == Some(&Experts::Same));

    let checkable = checkable(spec, count);
    let wanted = layer(spec, weights, &tokens.first(checkable, spec))?.output;
    let output = rows(&outcome.output, spec.hidden_size, same(checkable));
    let wanted = rows(&wanted, spec.hidden_size, same(checkable));
    let found_weights = rows(&found.weights, spec.top_k, same(count));
    let expected_weights = rows(&expected.weights, spec.top_k, same(count));
    let measure = |name, error, tolerance| Measure { name, error, tolerance };
    Ok(Comparison {
        wrong_tokens: of(Experts::Wrong),
        near_ties: of(Experts::NearTie),
        checked_tokens: same(checkable).count(),
        measures: vec![
            measure("topk_weights", metrics::relative_above_one(&found_weights, &expected_weights), WEIGHTS),
            measure("output_calc_diff", metrics::calc_diff(&output, &wanted), OUTPUT_CALC_DIFF),
            measure(
                "output_row_relative",
                metrics::row_relative(&output, &wanted, spec.hidden_size),
                OUTPUT_ROW_RELATIVE,
            ),
        ],
    })
}

/// How many of `count` tokens the reference computes in seconds; all where they share scales.
pub fn checkable(spec: &MoeSpec, count: usize) -> usize {
    match tokens_share_scales(spec) {
        true => count,
        false => (BUDGET / multiply_adds(spec).max(1)).clamp(1, count.max(1)),
    }
}

/// Ids and weights in ascending order of id.
struct Slots {
    ids: Vec<i32>,
    weights: Vec<f32>,
    top_k: usize,
}

impl Slots {
    fn of(ids: &[i32], weights: &[f32], top_k: usize) -> Self {
        let (ids, weights) = metrics::sort_slots(ids, weights, top_k);
        Self { ids, weights, top_k }
    }

    fn ids(&self, token: usize) -> &[i32] {
        row(&self.ids, self.top_k, token)
    }
}

fn row<T>(values: &[T], width: usize, row: usize) -> &[T] {
    values.get(row * width..(row + 1) * width).unwrap_or(&[])
}

fn rows(values: &[f32], width: usize, wanted: impl Iterator<Item = usize>) -> Vec<f32> {
    wanted.flat_map(|token| row(values, width, token)).copied().collect()
}

fn judge(
    spec: &MoeSpec,
    router: &RouterWeights<'_>,
    inputs: &Inputs<'_>,
    routed: &Routed,
    token: usize,
    [found, expected]: [&[i32]; 2],
) -> Result<Experts> {
    if found == expected {
        return Ok(Experts::Same);
    }
    let token_ids = inputs.token_ids.map(|ids| row(ids, 1, token));
    let favoured = favour(row(&routed.logits, spec.router_outputs(), token), found);
    let hidden_states = row(inputs.hidden_states, spec.hidden_size, token);
    let inputs = Inputs { token_ids, logits: Some(&favoured), ..Inputs::of(hidden_states) };
    let (spec, router) = (with_given_logits(spec), without_gemm(router));
    let mut ids = reference::route(&spec, &router, inputs)?.topk_ids;
    ids.sort_unstable();
    Ok(if ids == found { Experts::NearTie } else { Experts::Wrong })
}

/// Logits moved a little in favour of these experts. If the reference then chooses them, group
/// choice, bias and all, nothing but rounding stood against them.
fn favour(logits: &[f32], ids: &[i32]) -> Vec<f32> {
    let moved = |(id, logit): (usize, &f32)| {
        let step = NEAR_TIE / 2.0 * logit.abs().max(1.0);
        if ids.iter().any(|chosen| usize::try_from(*chosen) == Ok(id)) { logit + step } else { logit - step }
    };
    logits.iter().enumerate().map(moved).collect()
}

fn with_given_logits(spec: &MoeSpec) -> MoeSpec {
    let mut spec = spec.clone();
    // The reference's logits are those behind the rounding and the transform.
    spec.precision.router_gemm = moewe::spec::Rounding::F32;
    spec.router = Router::Given { transform: moewe::spec::LogitTransform::None };
    spec
}

fn without_gemm<'a>(router: &RouterWeights<'a>) -> RouterWeights<'a> {
    RouterWeights { weight: None, bias: None, input_scale: None, mlp: None, ..router.clone() }
}

/// Of one token in all experts that it passes.
fn multiply_adds(spec: &MoeSpec) -> usize {
    let mlp = |mlp: &ExpertMlp| (if mlp.activation.gated() { 3 } else { 2 }) * mlp.intermediate_size * spec.hidden_size;
    let shared = spec.shared.as_ref().map_or(0, |SharedExperts { mlp: shape, gate: _, combination: _ }| mlp(shape));
    spec.top_k * mlp(&spec.experts) + shared
}

#[cfg(test)]
mod tests {
    use moewe::host::Outcome;
    use moewe::spec::{ActivationQuant, FloatType};
    use moewe::{MoeSpec, families};

    use super::{Comparison, Measure, compare, favour};
    use crate::inputs::RandomTokens;
    use crate::reference_engine::layer;
    use crate::source;

    /// The complaint about a layer of four tokens whose result was changed.
    fn complaint(change: impl Fn(&mut Outcome, &MoeSpec)) -> Option<String> {
        let checkpoint = source::open(None).unwrap();
        let (input, output) = (FloatType::Bf16, FloatType::F32);
        let request = families::Request { layer: None, input, output, activations: ActivationQuant::None };
        let resolved = families::resolve(&checkpoint, &request).unwrap();
        let (spec, weights) = (&resolved.spec, resolved.weights(&checkpoint).unwrap());
        let tokens = RandomTokens::draw(spec, 4, 0).unwrap();
        let mut outcome = layer(spec, &weights, &tokens.first(4, spec)).unwrap();
        change(&mut outcome, spec);
        compare(spec, &weights, &tokens, 4, &outcome).unwrap().complaint()
    }

    #[test]
    fn the_reference_agrees_with_itself_in_any_order_of_slots() {
        assert_eq!(complaint(|_, _| {}), None);
        let reversed = |outcome: &mut Outcome, spec: &MoeSpec| {
            outcome.topk_ids[..spec.top_k].reverse();
            outcome.topk_weights[..spec.top_k].reverse();
        };
        assert_eq!(complaint(reversed), None);
    }

    #[test]
    fn every_part_of_a_result_is_compared() {
        let says = |part: &str, change: &dyn Fn(&mut Outcome, &MoeSpec)| {
            let complaint = complaint(change).expect(part);
            assert!(complaint.contains(part), "no `{part}` in: {complaint}");
        };
        says("topk_ids: 1 tokens", &|outcome, _| {
            outcome.topk_ids[0] = (0..12).find(|id| !outcome.topk_ids[..4].contains(id)).unwrap()
        });
        says("topk_weights", &|outcome, _| outcome.topk_weights[5] *= 1.0001);
        says("output_calc_diff", &|outcome, _| outcome.output.iter_mut().for_each(|value| *value *= 1.01));
        says("output_row_relative", &|outcome, spec| outcome.output[3 * spec.hidden_size] += 0.1);
        says("output_calc_diff: error NaN", &|outcome, _| outcome.output[7] = f32::NAN);
    }

    #[test]
    fn only_rounding_is_forgiven() {
        let near = favour(&[1.0, 1.000_009, 3.0], &[0, 2]);
        assert!(near[0] > near[1] && near[2] > near[0]);
        let far = favour(&[1.0, 1.000_02, 3.0], &[0, 2]);
        assert!(far[0] < far[1]);
    }

    #[test]
    fn a_nan_or_an_empty_comparison_is_a_complaint() {
        let measure = |error| Measure { name: "output_calc_diff", error, tolerance: 1.0 };
        let with = |checked_tokens, error| {
            Comparison { wrong_tokens: 0, near_ties: 0, checked_tokens, measures: vec![measure(error)] }.complaint()
        };
        assert_eq!(with(1, 1.0), None);
        assert!(with(1, f64::NAN).is_some_and(|complaint| complaint.contains("output_calc_diff")));
        assert!(with(0, 0.0).is_some());
    }
}
