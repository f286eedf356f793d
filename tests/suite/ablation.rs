//! `conformance::ablation`: what is left of a layer without a field is what the witness of that field says.

use std::collections::BTreeSet;

use moewe::conformance::ablation::{Ablation, BIAS_TYPE, ablations};
use moewe::conformance::vocabulary::vocabulary;
use moewe::conformance::witnesses::{Effect, Special, Witness, witnesses};
use moewe::reference::{self, Inputs};
use moewe::{Cpu, Options, Plan};

use crate::rig::RandomLayer;

/// Witnesses that the reference computes, with the rows that a layer reads.
fn layers() -> Vec<(Witness, RandomLayer)> {
    let legal = |witness: &Witness| reference::supports(&witness.spec).is_ok();
    let with_layer = |witness: Witness| {
        let layer = RandomLayer::new(witness.spec.clone(), 21);
        (witness, layer)
    };
    witnesses().into_iter().filter(legal).map(with_layer).collect()
}

/// The output of a layer without a field.
fn without(layer: &RandomLayer, ablation: &Ablation) -> Vec<f32> {
    let inputs = layer.all_inputs(24, 22);
    let adapter_ids = ablation.spec.lora.as_ref().and(inputs.view().adapter_ids);
    let inputs = Inputs { adapter_ids, ..inputs.view() };
    reference::layer(&ablation.spec, &ablation.weights(&layer.weights()), inputs).unwrap().output
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn what_is_left_of_any_layer_is_a_layer_that_differs_in_the_field() {
    let fields: BTreeSet<String> = vocabulary().fields.into_iter().collect();
    for (witness, layer) in layers() {
        for ablation in ablations(&witness.spec) {
            let Ablation { field, key, value, instead, spec } = &ablation;
            let at = format!("{} without {field}", witness.field);
            assert!(fields.contains(field) != (field == BIAS_TYPE), "{at}");
            assert_eq!(*spec == witness.spec, field == BIAS_TYPE, "{at}");
            spec.validate().unwrap_or_else(|error| panic!("{at}: {error}"));
            ablation.weights(&layer.weights()).check(spec).unwrap_or_else(|error| panic!("{at}: {error}"));
            assert!(!key.is_empty() && !value.is_empty() && !instead.is_empty(), "{at}");
            assert!(ablation.is_called(field) && ablation.is_called(key), "{at}");
            // Dropped once it is gone: nothing is left of it to drop.
            assert!(*field == BIAS_TYPE || ablations(spec).iter().all(|left| left.field != *field), "{at}");
        }
    }
}

#[test]
fn a_dropped_field_moves_its_witness_and_leaves_what_the_neutral_layer_gives() {
    let (mut dropped, mut neutral) = (BTreeSet::new(), 0);
    for (witness, layer) in layers() {
        let Witness { field, neutral: expected, spec, special, effect } = &witness;
        if *special != Special::No || *effect != Effect::Moves {
            continue;
        }
        let Some(ablation) = ablations(spec).into_iter().find(|ablation| ablation.field == *field) else { continue };
        let inputs = layer.all_inputs(24, 22);
        let whole = layer.judge(inputs.view()).output;
        let left = without(&layer, &ablation);
        assert_ne!(bits(&left), bits(&whole), "{field}: no difference");
        if ablation.spec == *expected {
            // Tensors of the same names are the same in both layers.
            let other = RandomLayer::new(expected.clone(), 21);
            let inputs = other.all_inputs(24, 22);
            assert_eq!(bits(&left), bits(&other.judge(inputs.view()).output), "{field}");
            neutral += 1;
        }
        dropped.insert(field.clone());
    }
    // Every word that a public fault is about, and most that a neutral value exists for.
    for field in [
        "experts.activation.Swiglu.limit",
        "shared.mlp.activation.Swiglu.limit",
        "routing.routed_scaling_factor",
        "routing.renormalize",
        "routing.method.TopK.key.ScorePlusBias",
        "routing.method.TopK.groups",
        "routing.method.TopK.score.Sigmoid",
        "routing.per_expert_scale",
        "router.Linear.bias",
        "shared.gate.Sigmoid",
        "lora",
        "output_norm",
    ] {
        assert!(dropped.contains(field), "{field}: {dropped:?}");
    }
    assert!(dropped.len() >= 60 && neutral >= 40, "{} {neutral}: {dropped:#?}", dropped.len());
}

#[test]
fn the_type_of_the_bias_is_dropped_by_rounding_it() {
    let layer = RandomLayer::new(crate::rig::deepseek_like(), 21);
    let all = ablations(&layer.spec);
    let ablation = all.iter().find(|ablation| ablation.field == BIAS_TYPE).unwrap();
    let (weights, left) = (layer.weights(), ablation.weights(&layer.weights()));
    let (bias, rounded) = (weights.router.selection_bias.unwrap(), left.router.selection_bias.unwrap());
    assert_ne!(bias, rounded);
    assert!(bias.iter().zip(&rounded).all(|(bias, rounded)| half::bf16::from_f32(*bias).to_f32() == *rounded));
    // A backend plans what is left of a layer like any other.
    Plan::new(Cpu::new(), &ablation.spec, &ablation.weights(&layer.weights()), 4, &Options::AUTO).unwrap();
}
