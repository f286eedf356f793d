//! Selection in hard cases: ties, scores that are not finite, negative keys, tables. All exact, on the
//! reference, the twins and the device.

use moewe::host::{Outcome, Session};
use moewe::reference::{self, Inputs};
use moewe::spec::*;
use moewe::{Cpu, Plan, RouterWeights};

use crate::rig::{AUTO, deepseek_like, gpu};

/// A router whose logits are the token's row itself: W = identity, in f32.
fn logits_are_inputs(outputs: usize, method: RoutingMethod, top_k: usize) -> MoeSpec {
    let mut spec = deepseek_like();
    spec.hidden_size = outputs;
    spec.num_experts = outputs;
    spec.top_k = top_k;
    spec.router = Router::Linear {
        input: RouterInput::Hidden,
        format: WeightFormat::F32,
        bias: false,
        transform: LogitTransform::None,
    };
    spec.routing.method = method;
    spec.routing.renormalize = None;
    spec.routing.routed_scaling_factor = 1.0;
    spec.precision = Precision::float32(FloatType::F32, FloatType::F32);
    spec
}

struct Case<'a> {
    spec: &'a MoeSpec,
    bias: Option<&'a [f32]>,
    table: Option<&'a [i32]>,
    token_ids: Option<&'a [u32]>,
    logits: &'a [f32],
}

impl Case<'_> {
    /// Ids and weights of reference, cpu and wgpu for given logits.
    fn run(&self) -> Vec<(&'static str, Vec<i32>, Vec<f32>)> {
        let n = self.spec.hidden_size;
        assert_eq!(self.logits.len(), n, "one token a case");
        let mut spec = self.spec.clone();
        spec.router = Router::Given { transform: LogitTransform::None };
        let router = RouterWeights {
            selection_bias: self.bias.map(<[f32]>::to_vec),
            tid2eid: self.table.map(<[i32]>::to_vec),
            ..RouterWeights::NONE
        };
        let hidden_states = vec![1.0; n];
        let logits = Some(self.logits);
        let inputs = Inputs { token_ids: self.token_ids, logits, ..Inputs::of(&hidden_states) };
        let want = reference::route(&spec, &router, inputs).unwrap();
        let plan = Plan::routing(Cpu::new(), &spec, &router, 1, &AUTO).unwrap();
        let cpu: Outcome = Session::new(plan, &spec).unwrap().run(&inputs).unwrap();
        let plan = Plan::routing(gpu().clone(), &spec, &router, 1, &AUTO).unwrap();
        let wgpu: Outcome = Session::new(plan, &spec).unwrap().run(&inputs).unwrap();
        vec![
            ("reference", want.topk_ids, want.topk_weights),
            ("cpu", cpu.topk_ids, cpu.topk_weights),
            ("wgpu", wgpu.topk_ids, wgpu.topk_weights),
        ]
    }

    fn expect(&self, ids: &[i32], weights: &[f32]) {
        for (who, got_ids, got_weights) in self.run() {
            assert_eq!(got_ids, ids, "{who}: {:?}", self.logits);
            for (got, want) in got_weights.iter().zip(weights) {
                // One exponential and one division apart.
                let close = (got - want).abs() <= 1e-6 || (got.is_nan() && want.is_nan());
                assert!(close, "{who}: weights {got_weights:?}, expected {weights:?}");
            }
        }
    }
}

fn plain(score: Score) -> RoutingMethod {
    RoutingMethod::TopK { score, key: SelectionKey::Score, groups: None }
}

fn biased(score: Score) -> RoutingMethod {
    RoutingMethod::TopK { score, key: SelectionKey::ScorePlusBias, groups: None }
}

fn case<'a>(spec: &'a MoeSpec, logits: &'a [f32]) -> Case<'a> {
    Case { spec, bias: None, table: None, token_ids: None, logits }
}

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

#[test]
fn ties_go_to_the_lower_id_and_minus_zero_equals_zero() {
    for score in [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus] {
        let mut spec = logits_are_inputs(6, plain(score), 3);
        spec.routing.renormalize = Some(Denominator::Sum);
        case(&spec, &[0.5; 6]).expect(&[0, 1, 2], &[1.0 / 3.0; 3]);
    }
    let spec = logits_are_inputs(5, plain(Score::Identity), 3);
    case(&spec, &[-1.0, -0.0, 0.0, -0.0, -2.0]).expect(&[1, 2, 3], &[0.0; 3]);
    let spec = logits_are_inputs(5, RoutingMethod::TopKThenScore { score: ChosenScore::Softmax }, 2);
    case(&spec, &[1.0, 3.0, 3.0, 3.0, 0.0]).expect(&[1, 2], &[0.5, 0.5]);
}

#[test]
fn negative_keys_select_experts_and_not_a_fill_value() {
    // SPEC 5 rows 14 and 16: masks of 0 or a start at 0 or -1 select nothing, or the wrong group.
    let spec = logits_are_inputs(6, biased(Score::Sigmoid), 2);
    let bias = [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0];
    let half = Case { bias: Some(&bias), ..case(&spec, &[0.0; 6]) };
    half.expect(&[5, 4], &[0.5, 0.5]);
    let groups = Some(Groups { n_group: 3, topk_group: 1, score: GroupScore::Top2SumOfKey });
    let method = RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups };
    let spec = logits_are_inputs(6, method, 2);
    Case { bias: Some(&[-3.0, -9.0, -5.0, -5.5, -1.0, -99.0]), ..case(&spec, &[0.0; 6]) }.expect(&[2, 3], &[0.5, 0.5]);
}

#[test]
fn the_bias_selects_and_never_weighs() {
    // SPEC 5 rows 9 and 10: a large bias would cancel a small score.
    let spec = logits_are_inputs(4, biased(Score::Sigmoid), 1);
    let logits = [-9.0, 2.0, 1.0, 0.0];
    let weight = 1.0 / (1.0 + 9f32.exp());
    for (who, ids, weights) in (Case { bias: Some(&[35.0, 0.0, 0.0, 0.0]), ..case(&spec, &logits) }).run() {
        assert_eq!(ids, [0], "{who}");
        assert!((weights[0] / weight - 1.0).abs() < 1e-5, "{who}: {weights:?} of {weight}");
    }
}

#[test]
fn scores_that_are_not_finite_come_last_with_weight_zero() {
    for (score, best) in [(Score::Sigmoid, 1.0 / (1.0 + (-2f32).exp())), (Score::SqrtSoftplus, 1.458_398_6)] {
        let spec = logits_are_inputs(4, plain(score), 3);
        case(&spec, &[NAN, NAN, 2.0, NAN]).expect(&[2, 0, 1], &[best, 0.0, 0.0]);
        case(&spec, &[NAN; 4]).expect(&[0, 1, 2], &[0.0; 3]);
    }
    let spec = logits_are_inputs(4, plain(Score::Sigmoid), 3);
    case(&spec, &[INF, -INF, 0.0, NAN]).expect(&[0, 2, 1], &[1.0, 0.5, 0.0]);
    let spec = logits_are_inputs(4, plain(Score::Identity), 3);
    case(&spec, &[INF, -INF, -7.0, NAN]).expect(&[2, 0, 1], &[-7.0, 0.0, 0.0]);
    let spec = logits_are_inputs(3, plain(Score::Softmax), 2);
    case(&spec, &[1.0, NAN, 2.0]).expect(&[0, 1], &[0.0, 0.0]);
    case(&spec, &[1.0, INF, 2.0]).expect(&[0, 1], &[0.0, 0.0]);
    case(&spec, &[-INF; 3]).expect(&[0, 1], &[0.0, 0.0]);
    case(&spec, &[-INF, 0.0, -INF]).expect(&[1, 0], &[1.0, 0.0]);
    let spec = logits_are_inputs(4, RoutingMethod::TopKThenScore { score: ChosenScore::Softmax }, 3);
    case(&spec, &[NAN, 1.0, -INF, 1.0]).expect(&[1, 3, 2], &[0.5, 0.5, 0.0]);
    case(&spec, &[NAN, 1.0, INF, -2.0]).expect(&[1, 3, 0], &[1.0 / (1.0 + (-3f32).exp()), 0.047_425_874, 0.0]);
    case(&spec, &[NAN; 4]).expect(&[0, 1, 2], &[0.0; 3]);
    case(&spec, &[-INF; 4]).expect(&[0, 1, 2], &[0.0; 3]);
    let spec = logits_are_inputs(4, RoutingMethod::TopKThenScore { score: ChosenScore::Sigmoid }, 4);
    case(&spec, &[NAN, -INF, INF, 0.0]).expect(&[2, 3, 1, 0], &[1.0, 0.5, 0.0, 0.0]);
}

#[test]
fn nan_policy_propagate_gives_nan_weights_at_the_same_ids() {
    let mut spec = logits_are_inputs(4, plain(Score::Sigmoid), 3);
    spec.routing.nan_policy = NanPolicy::Propagate;
    case(&spec, &[NAN, NAN, 0.0, NAN]).expect(&[2, 0, 1], &[0.5, NAN, NAN]);
    spec.routing.renormalize = Some(Denominator::Sum);
    case(&spec, &[NAN, NAN, 0.0, NAN]).expect(&[2, 0, 1], &[NAN; 3]);
}

#[test]
fn a_sum_of_zero_gives_weights_of_zero() {
    for rule in [Denominator::Sum, Denominator::SumPlus { eps: 1e-20 }, Denominator::SumOrOne] {
        let mut spec = logits_are_inputs(4, plain(Score::Sigmoid), 2);
        spec.routing.renormalize = Some(rule);
        case(&spec, &[-INF; 4]).expect(&[0, 1], &[0.0, 0.0]);
    }
}

#[test]
fn scores_keep_their_digits_at_both_ends() {
    // softplus(l) for very negative l is exp(l): log(1 + exp l) computed as it reads would be 0.
    let spec = logits_are_inputs(3, plain(Score::SqrtSoftplus), 3);
    let logits = [-15.0f32, -3.0, 30.0];
    let exact = logits.map(|l| (f64::from(l).exp().ln_1p().sqrt()) as f32);
    for (who, _, weights) in case(&spec, &logits).run() {
        for (got, want) in weights.iter().zip([exact[2], exact[1], exact[0]]) {
            assert!((got / want - 1.0).abs() < 1e-5, "{who}: {got} {want}");
        }
    }
}

#[test]
fn scores_too_small_for_a_device_still_have_their_order() {
    // f32 holds these as subnormals, which devices flush to 0; beyond them exact zeros tie.
    let spec = logits_are_inputs(6, plain(Score::Softmax), 3);
    case(&spec, &[0.0, -95.0, -90.0, -92.0, -99.0, -200.0]).expect(&[0, 2, 3], &[1.0, 0.0, 0.0]);
    case(&spec, &[-300.0, -200.0, 0.0, -250.0, -120.0, -110.0]).expect(&[2, 0, 1], &[1.0, 0.0, 0.0]);
    let spec = logits_are_inputs(5, plain(Score::Sigmoid), 2);
    case(&spec, &[-89.0, -88.6, -88.2, -88.1, -100.0]).expect(&[3, 2], &[0.0, 0.0]);
    // The root of softplus is no small number where softplus is.
    let spec = logits_are_inputs(3, plain(Score::SqrtSoftplus), 3);
    let logits = [-80.0f32, -60.0, -85.0];
    for (who, ids, weights) in case(&spec, &logits).run() {
        assert_eq!(ids, [1, 0, 2], "{who}");
        for (got, id) in weights.iter().zip([1usize, 0, 2]) {
            let want = (f64::from(logits[id]) / 2.0).exp();
            assert!((f64::from(*got) / want - 1.0).abs() < 1e-4, "{who}: {got} {want}");
        }
    }
}

#[test]
fn groups_tie_to_the_lower_group_and_the_second_best_may_equal_the_best() {
    let groups = |score| Some(Groups { n_group: 2, topk_group: 1, score });
    let method =
        |score| RoutingMethod::TopK { score: Score::Identity, key: SelectionKey::Score, groups: groups(score) };
    let logits = [3.0, 3.0, 0.0, 4.0, 2.0, 0.0];
    let spec = logits_are_inputs(6, method(GroupScore::Top2SumOfKey), 2);
    case(&spec, &logits).expect(&[0, 1], &[3.0, 3.0]);
    let spec = logits_are_inputs(6, method(GroupScore::MaxOfScore), 2);
    case(&spec, &logits).expect(&[3, 4], &[4.0, 2.0]);
    // A group with one finite member has no sum of two: it comes last.
    let spec = logits_are_inputs(6, method(GroupScore::Top2SumOfKey), 2);
    case(&spec, &[9.0, NAN, NAN, -4.0, -2.0, -9.0]).expect(&[4, 3], &[-2.0, -4.0]);
}

#[test]
fn a_hash_table_may_repeat_an_id_and_a_token_outside_of_it_is_an_error() {
    let method = RoutingMethod::Hash { score: Score::SqrtSoftplus, vocab_size: 2 };
    let spec = logits_are_inputs(3, method, 2);
    let table = [0, 1, 2, 2];
    let score = |l: f32| l.exp().ln_1p().sqrt();
    let hash = |ids| Case { table: Some(&table), token_ids: Some(ids), ..case(&spec, &[0.0, 1.0, 2.0]) };
    hash(&[1]).expect(&[2, 2], &[score(2.0), score(2.0)]);
    hash(&[0]).expect(&[0, 1], &[score(0.0), score(1.0)]);

    // Outside: the reference refuses; a device marks the ids and spoils the row, never a silent zero.
    let mut spec = deepseek_like();
    spec.routing.method = RoutingMethod::Hash { score: Score::Sigmoid, vocab_size: 17 };
    let layer = crate::rig::RandomLayer::new(spec, 31);
    let (hidden_states, _) = layer.inputs(2, 32);
    let inputs = Inputs { token_ids: Some(&[3, 17]), ..Inputs::of(&hidden_states) };
    let error = reference::layer(&layer.spec, &layer.weights(), inputs).unwrap_err().to_string();
    assert!(error.contains("17") && error.contains("outside of the hash table"), "{error}");
    for outcome in [layer.on_cpu(2, &AUTO, None).run(&inputs).unwrap(), layer.on_gpu(2, &AUTO).run(&inputs).unwrap()] {
        assert_eq!(outcome.topk_ids[3..], [-2; 3]);
        let (first, second) = outcome.output.split_at(40);
        assert!(first.iter().all(|value| value.is_finite()) && second.iter().all(|value| value.is_nan()));
    }
}
