//! Every float layer and every router of the golden set, resolved by its family and computed by the reference.

use moewe::checkpoint::Checkpoint;
use moewe::families::{Request, resolve, resolve_router};
use moewe::reference::{self, Inputs, Routed};
use moewe::spec::FloatType;
use moewe::weights::Tensor;
use serde_json::Value;

use crate::samples::{ANY, golden};

/// The cases of a kind in the manifest.
fn cases(kind: &str) -> Vec<Value> {
    let manifest = std::fs::read_to_string(golden("MANIFEST.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    cases.iter().filter(|case| case["kind"] == kind).cloned().collect()
}

/// `io.safetensors` of a case.
fn io(case: &str) -> Checkpoint {
    let bytes = std::fs::read(golden(case).join("io.safetensors")).unwrap();
    Checkpoint::from_bytes("{}", vec![("io.safetensors".into(), bytes.into())]).unwrap()
}

fn floats(tensor: &Tensor<'_>) -> Vec<f32> {
    tensor.to_f32(tensor.shape.iter().product()).unwrap()
}

fn largest_difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference = |(a, b): (&f32, &f32)| f64::from(*a) - f64::from(*b);
    found.iter().zip(expected).map(difference).map(f64::abs).fold(0.0, |most, one| if one <= most { most } else { one })
}

/// Ids in ascending order, and the weights with them.
fn sorted(ids: &[i32], weights: &[f32], top_k: usize) -> (Vec<i32>, Vec<f32>) {
    let rows = ids.chunks(top_k).zip(weights.chunks(top_k));
    rows.flat_map(|(ids, weights)| {
        let mut row: Vec<(i32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
        row.sort_by_key(|(id, _)| *id);
        row
    })
    .unzip()
}

struct Batch<'a> {
    io: &'a Checkpoint,
    prefix: &'a str,
}

impl Batch<'_> {
    fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.io.tensor(&format!("{}{name}", self.prefix))
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        floats(&self.get(name).unwrap_or_else(|| panic!("no {}{name}", self.prefix)))
    }

    #[track_caller]
    fn judge_routing(&self, case: &Value, routed: &Routed, top_k: usize) {
        let name = case["name"].as_str().unwrap();
        let ids = self.get("topk_ids").unwrap();
        let expected = ids.to_i32(ids.shape.iter().product()).unwrap();
        let (expected_ids, expected) = sorted(&expected, &self.floats("topk_weights"), top_k);
        let (ids, weights) = sorted(&routed.topk_ids, &routed.topk_weights, top_k);
        assert_eq!(ids, expected_ids, "{name} {}", self.prefix);
        let tolerance = match case["atol_weights"].as_f64() {
            Some(tolerance) => tolerance,
            None => 8.0 * case["max_weight_err_f32_vs_f64"].as_f64().unwrap(),
        };
        let error = largest_difference(&weights, &expected);
        assert!(error <= tolerance, "{name} {}topk_weights: {error:e} of {tolerance:e}", self.prefix);
    }
}

#[test]
fn the_reference_agrees_with_every_golden_layer() {
    let cases = cases("float");
    assert_eq!(cases.len(), 20);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let request = Request { layer: case["layer"].as_u64().map(|layer| layer as usize), ..ANY };
        let resolved = resolve(&checkpoint, &request).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(resolved.unknown_keys, [""; 0], "{name}");
        assert_eq!(resolved.notes, [""; 0], "{name}");
        // Without a number too: it is the only layer that is there.
        assert_eq!(resolve(&checkpoint, &ANY).unwrap().spec, resolved.spec, "{name}");
        let weights = resolved.weights(&checkpoint).unwrap();
        let io = io(name);
        for prefix in ["t1.", "t7.", "t64."] {
            let batch = Batch { io: &io, prefix };
            let hidden_states = batch.floats("hidden_states");
            let token_ids: Option<Vec<u32>> = batch.get("input_ids").map(|ids| {
                ids.to_i32(ids.shape[0]).unwrap().into_iter().map(|id| u32::try_from(id).unwrap()).collect()
            });
            let inputs = Inputs { token_ids: token_ids.as_deref(), ..Inputs::of(&hidden_states) };
            let layer = reference::layer(&resolved.spec, &weights, inputs).unwrap();
            batch.judge_routing(case, &layer.routed, resolved.spec.top_k);
            let (error, tolerance) =
                (largest_difference(&layer.output, &batch.floats("output")), case["atol"].as_f64().unwrap());
            assert!(error <= tolerance, "{name} {prefix}output: {error:e} of {tolerance:e}");
        }
    }
}

#[test]
fn the_reference_agrees_with_every_golden_router() {
    let cases = cases("routing");
    assert_eq!(cases.len(), 10);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let request = Request { input: FloatType::Bf16, ..ANY };
        let resolved = resolve_router(&checkpoint, &request).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(resolved.unknown_keys, [""; 0], "{name}");
        let weights = resolved.router_weights(&checkpoint).unwrap();
        let io = io(name);
        let batch = Batch { io: &io, prefix: "" };
        let hidden_states = batch.floats("hidden_states");
        let routed = reference::route(&resolved.spec, &weights, Inputs::of(&hidden_states)).unwrap();
        batch.judge_routing(case, &routed, resolved.spec.top_k);
    }
}
