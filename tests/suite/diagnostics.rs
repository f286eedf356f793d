//! Counts that explain accuracy: of crafted inputs, on every backend, and no effect on the results.

use moewe::Options;
use moewe::host::{Host, Session};
use moewe::reference::Inputs;
use moewe::schedule::{DIAGNOSTICS, Diagnostics, Schedule};
use moewe::spec::*;

use crate::rig::{GEMV, RandomLayer, TILED, deepseek_like};

fn counted<B: Host>(session: &Session<B>, inputs: &Inputs<'_>) -> (Diagnostics, Vec<f32>) {
    let outcome = session.run(inputs).unwrap();
    let buffer = session.scratch().buffer(DIAGNOSTICS).unwrap();
    (Schedule::diagnostics(&session.plan().backend().read(buffer).unwrap()).unwrap(), outcome.output)
}

/// On both backends, which have to agree where the counted values are not beside a limit.
fn on_both(spec: &MoeSpec, base: Options, x: &[f32]) -> (Diagnostics, Vec<f32>, Vec<i32>) {
    let layer = RandomLayer::new(spec.clone(), 21);
    let tokens = x.len() / spec.hidden_size;
    let options = Options { diagnostics: true, ..base };
    let (gpu, output) = counted(&layer.on_gpu(tokens, &options), &Inputs::of(x));
    let (cpu, _) = counted(&layer.on_cpu(tokens, &options, None), &Inputs::of(x));
    assert_eq!(gpu, cpu);
    let plain = layer.on_gpu(tokens, &base).run(&Inputs::of(x)).unwrap();
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&plain.output), bits(&output), "counting changed a result");
    (gpu, output, plain.topk_ids)
}

#[test]
fn load_counts_the_rows_of_each_expert() {
    for base in [GEMV, TILED] {
        let spec = deepseek_like();
        let x = RandomLayer::new(spec.clone(), 21).all_inputs(9, 4).hidden_states;
        let (found, _, ids) = on_both(&spec, base, &x);
        let load: Vec<u32> = (0..12).map(|expert| ids.iter().filter(|id| **id == expert).count() as u32).collect();
        assert_eq!(found.load, load);
        assert_eq!(found.non_finite_logits, 0);
        assert_eq!(found.infinite_outputs, 0);
    }
}

#[test]
fn clamps_saturations_and_infinities_are_counted() {
    for base in [GEMV, TILED] {
        let mut spec = deepseek_like();
        spec.precision.output = FloatType::F16;
        let rows = |layer: &RandomLayer, factor: f32| -> Vec<f32> {
            layer.all_inputs(5, 4).hidden_states.iter().map(|x| x * factor).collect()
        };
        let layer = RandomLayer::new(spec.clone(), 21);
        // Limits of 0.75 and 0.5: small rows never reach them, large ones nearly always do.
        let (small, _, _) = on_both(&spec, base, &rows(&layer, 1.0 / 1024.0));
        assert_eq!([small.experts.clamped_gate, small.experts.clamped_up, small.shared.clamped_up], [0, 0, 0]);
        let (large, _, _) = on_both(&spec, base, &rows(&layer, 1024.0));
        let (routed, shared) = (5 * 3 * 24, 5 * 20);
        assert!(large.experts.clamped_up > routed * 9 / 10 && large.experts.clamped_up <= routed);
        assert!(large.experts.clamped_gate > routed / 3 && large.experts.clamped_gate < routed * 2 / 3);
        assert!(large.shared.clamped_up > shared * 9 / 10 && large.shared.clamped_up <= shared);
        assert_eq!(large.infinite_outputs, 0);

        // Without limits the same rows overflow an f16 output.
        spec.experts.activation = Activation::Swiglu { limit: None };
        let (found, output, _) = on_both(&spec, base, &rows(&layer, 1024.0));
        assert_eq!(found.experts.clamped_up, 0);
        assert_eq!(found.infinite_outputs as usize, output.iter().filter(|value| value.is_infinite()).count());
        assert!(found.infinite_outputs > 0);

        // An input beyond what a static scale allows.
        spec.experts.activation_quant = ActivationQuant::Static { code: ActivationCode::E4m3 };
        spec.experts.format = WeightFormat::Fp8Tensor;
        let (found, _, _) = on_both(&spec, base, &rows(&layer, 1.0 / 4096.0));
        assert_eq!(found.experts.saturated_input, 0);
        let (found, _, _) = on_both(&spec, base, &rows(&layer, 4096.0));
        assert!(found.experts.saturated_input as usize > 5 * 3 * 40 * 9 / 10);

        let mut x = rows(&layer, 1.0);
        x[3] = f32::INFINITY;
        let mut spec = deepseek_like();
        spec.precision.input = FloatType::F32;
        let (found, _, _) = on_both(&spec, base, &x);
        // Weights that are 0 would make NaN; either way every logit of that token is not finite.
        assert_eq!(found.non_finite_logits, 12);
    }
}
