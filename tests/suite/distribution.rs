//! Parts of a layer, adapters and batched rows: what adds up, what is the same another way, what is refused.

use moewe::host::{Host, Session};
use moewe::reference::{self, Inputs};
use moewe::schedule::EXPERT_MISSES;
use moewe::spec::*;
use moewe::weights::{Dtype, Rows, Stored};
use moewe::{Cpu, Error, Io, Options, Plan, Tokens};

use crate::layers::{check, check_inputs};
use crate::rig::{AUTO, GEMV, RandomLayer, TILED, deepseek_like, gpu};

const TOKENS: usize = 21;

/// Largest |a - b| relative to the largest |a|: sums of the same f32 terms in another order.
fn near(want: &[f32], got: &[f32], what: &str) {
    assert_eq!(want.len(), got.len(), "{what}");
    let largest = want.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    for (at, (want, got)) in want.iter().zip(got).enumerate() {
        assert!((want - got).abs() <= 2e-5 * largest, "{what}: value {at} is {got}, expected {want}");
    }
}

/// The output of `layer` on the reference and on both backends, with the kernels of `options`.
fn outputs(layer: &RandomLayer, options: &Options, inputs: Inputs<'_>) -> [(&'static str, Vec<f32>); 3] {
    let tokens = inputs.hidden_states.len() / layer.spec.hidden_size;
    [
        ("reference", layer.judge(inputs).output),
        ("cpu", layer.on_cpu(tokens, options, None).run(&inputs).unwrap().output),
        ("wgpu", layer.on_gpu(tokens, options).run(&inputs).unwrap().output),
    ]
}

/// Everything that a sum over devices has once, and a bias inside of it.
fn whole() -> MoeSpec {
    let mut spec = deepseek_like();
    spec.experts.down_bias = true;
    spec.experts.gate_up_bias = true;
    spec.output_bias = true;
    spec.routing.zero_experts = Some(ZeroExperts { count: 4, kind: ZeroExpertKind::Identity });
    spec
}

/// The parts' outputs added up are the whole's, on each backend.
fn adds_up(spec: &MoeSpec, parts: &[MoeSpec], what: &str) {
    let layer = RandomLayer::new(spec.clone(), 31);
    let inputs = layer.all_inputs(TOKENS, 5);
    let want = layer.judge(inputs.view()).output;
    for options in [GEMV, TILED] {
        let mut sums = [vec![0.0; want.len()], vec![0.0; want.len()], vec![0.0; want.len()]];
        let mut names = [""; 3];
        for part in parts {
            let part = RandomLayer::new(part.clone(), 31);
            for (at, (name, output)) in outputs(&part, &options, inputs.view()).into_iter().enumerate() {
                names[at] = name;
                sums[at].iter_mut().zip(output).for_each(|(sum, value)| *sum += value);
            }
        }
        for (name, sum) in names.iter().zip(&sums) {
            near(&want, sum, &format!("{what}, {name}, {options:?}"));
        }
    }
}

fn common(first: bool) -> CommonTerms {
    if first { CommonTerms::Here } else { CommonTerms::Elsewhere }
}

#[test]
fn outputs_of_expert_ranges_add_up_to_the_layer() {
    for combination in [SharedCombination::Sum, SharedCombination::Average] {
        let mut spec = whole();
        spec.shared.as_mut().unwrap().combination = combination;
        let part = |first: usize, count: usize, here: bool| MoeSpec {
            placement: Placement::Range { first, count },
            common_terms: common(here),
            ..spec.clone()
        };
        adds_up(&spec, &[part(0, 5, false), part(5, 1, true), part(6, 6, false)], "ranges");
    }
}

/// transformers #48205: an expert of another device was taken for a sentinel's, or read memory.
#[test]
fn bug_32_an_expert_that_is_elsewhere_adds_nothing_and_reads_nothing() {
    let mut spec = deepseek_like();
    (spec.shared, spec.experts.format) = (None, WeightFormat::F32);
    spec.placement = Placement::Range { first: 4, count: 5 };
    let layer = RandomLayer::new(spec.clone(), 40);
    let inputs = layer.all_inputs(TOKENS, 5);
    // One expert here, one before and one behind those that are here, or none at all here.
    let ids: Vec<i32> =
        (0..TOKENS as i32).flat_map(|t| if t % 4 == 0 { [0, 11, -1] } else { [4 + t % 5, 3, 9] }).collect();
    let routed = reference::Routed {
        logits: vec![],
        topk_weights: (0..ids.len()).map(|at| 0.25 + at as f32 / 64.0).collect(),
        topk_ids: ids,
        shared_weights: vec![],
        router_states: vec![],
    };
    let want = reference::experts(&spec, &layer.weights(), inputs.view(), &routed).unwrap();
    fn run<B: Host>(session: &Session<B>, inputs: &Inputs<'_>, routed: &reference::Routed) -> Vec<f32> {
        let host = session.plan().backend();
        session.write(inputs).unwrap();
        let write = |name: &str, words: &[u32]| host.write(session.scratch().buffer(name).unwrap(), 0, words).unwrap();
        write("topk_ids", bytemuck::cast_slice(&routed.topk_ids));
        write("topk_weights", bytemuck::cast_slice(&routed.topk_weights));
        let mut encoder = host.encoder();
        session.bound().record_experts(&mut encoder, &Tokens::Host(TOKENS)).unwrap();
        host.submit(encoder).unwrap();
        session.outcome(TOKENS).unwrap().output
    }
    for options in [GEMV, TILED] {
        for (name, got) in [
            // Scratch begins as NaN: a row that nobody computes and somebody adds would show.
            ("cpu", run(&layer.on_cpu(TOKENS, &options, None), &inputs.view(), &routed)),
            ("wgpu", run(&layer.on_gpu(TOKENS, &options), &inputs.view(), &routed)),
        ] {
            near(&want, &got, &format!("{name}, {options:?}"));
            for (token, row) in got.chunks(40).enumerate() {
                assert_eq!(row.iter().all(|value| *value == 0.0), token % 4 == 0, "{name}, token {token}");
            }
        }
    }
}

/// SGLang #26845: the shared expert was added by each device.
#[test]
fn bug_38_the_shared_expert_is_added_by_one_device_and_any_other_number_shows() {
    let spec = deepseek_like();
    let part = |first: usize, here: bool| MoeSpec {
        placement: Placement::Range { first, count: 6 },
        common_terms: common(here),
        ..spec.clone()
    };
    adds_up(&spec, &[part(0, true), part(6, false)], "by the first");
    adds_up(&spec, &[part(0, false), part(6, true)], "by the second");
    let layer = RandomLayer::new(spec.clone(), 31);
    let inputs = layer.all_inputs(TOKENS, 5);
    let want = layer.judge(inputs.view()).output;
    for (here, times) in [(true, 2), (false, 0)] {
        let judged = [0, 6].map(|first| RandomLayer::new(part(first, here), 31).judge(inputs.view()).output);
        let sum: Vec<f32> = judged[0].iter().zip(&judged[1]).map(|(a, b)| a + b).collect();
        let largest = want.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let off = want.iter().zip(&sum).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(off > 0.05 * largest, "the shared expert {times} times is off by {off} of {largest} only");
    }
}

#[test]
fn outputs_of_maps_and_replicas_add_up_to_the_layer() {
    let spec = whole();
    // Experts 0, 3, 6, 9 here in another order, expert 6 twice; the rest there.
    let here = vec![2, -1, -1, 0, -1, -1, 1, -1, -1, 4, -1, -1];
    let two = |slot: i32| if slot == 1 { [1, 3] } else { [slot, slot] };
    let slots: Vec<i32> = here.iter().flat_map(|slot| two(*slot)).collect();
    let mut next = 0;
    let mut count = || {
        next += 1;
        next - 1
    };
    let there: Vec<i32> = here.iter().map(|slot| if *slot < 0 { count() } else { -1 }).collect();
    let map = |num_slots, replicas, slots: Vec<i32>, here| MoeSpec {
        placement: Placement::Map { num_slots, replicas, slots },
        common_terms: common(here),
        ..spec.clone()
    };
    adds_up(&spec, &[map(5, 2, slots, true), map(8, 1, there, false)], "maps");
}

#[test]
fn replicas_change_no_bit() {
    let mut spec = deepseek_like();
    spec.precision.combine_order = CombineOrder::Expert;
    let slots: Vec<i32> = (0..12).flat_map(|expert| [expert, (expert + 5) % 12 + 12, expert]).collect();
    // Each expert in two slots, of which three entries choose.
    let replicated =
        MoeSpec { placement: Placement::Map { num_slots: 24, replicas: 3, slots: owners(slots) }, ..spec.clone() };
    let (one, many) = (RandomLayer::new(spec, 8), RandomLayer::new(replicated, 8));
    let inputs = one.all_inputs(70, 5);
    for options in [GEMV, TILED] {
        for ((name, one), (_, many)) in
            outputs(&one, &options, inputs.view()).iter().zip(&outputs(&many, &options, inputs.view()))
        {
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(one), bits(many), "{name}, {options:?}");
        }
    }
}

/// Any distinct slots: the table that they make.
fn owners(slots: Vec<i32>) -> Vec<i32> {
    let expert_of = |slot: i32| slots.iter().position(|other| *other == slot).unwrap() / 3;
    assert!((0..24).all(|slot| slots.iter().enumerate().all(|(at, s)| *s != slot || at / 3 == expert_of(slot))));
    slots
}

#[test]
fn outputs_of_shards_add_up_wherever_they_are_cut() {
    let block = |block, scale| WeightFormat::Fp8Block { block, scale };
    let int4 = |zero_points, act_order| WeightFormat::Int4 {
        group: Some(64),
        scale: if zero_points { ScaleFormat::F16 } else { ScaleFormat::Bf16 },
        zero_points,
        act_order,
    };
    for (format, inner, cuts) in [
        (WeightFormat::Bf16, 24, vec![0, 7, 8, 24]),
        (WeightFormat::Fp8Channel, 50, vec![0, 1, 50]),
        // 1536 / 8 = 192 of blocks of 128, as in vLLM #39046; blocks cut anywhere; a tail.
        (block([128, 128], ScaleFormat::F32), 576, vec![0, 192, 384, 576]),
        (block([128, 128], ScaleFormat::Bf16), 300, vec![0, 16, 144, 272, 300]),
        (block([32, 32], ScaleFormat::E8m0), 96, vec![0, 48, 96]),
        (WeightFormat::Mxfp4, 96, vec![0, 32, 48, 96]),
        (WeightFormat::Nvfp4, 96, vec![0, 16, 80, 96]),
        (int4(false, false), 160, vec![0, 32, 80, 160]),
        (int4(true, false), 160, vec![0, 48, 128, 160]),
        (WeightFormat::Q8_0, 96, vec![0, 16, 48, 96]),
    ] {
        let mut spec = whole();
        (spec.hidden_size, spec.experts.intermediate_size, spec.experts.format) = (64, inner, format);
        let parts: Vec<MoeSpec> = (1..cuts.len())
            .map(|at| {
                let (first, size) = (cuts[at - 1], cuts[at] - cuts[at - 1]);
                let shard = TensorShard::Part { first, size, owns_down_bias: at == 1 };
                MoeSpec { shard, common_terms: common(at == 1), ..spec.clone() }
            })
            .collect();
        adds_up(&spec, &parts, &format!("{format:?}"));
    }
}

#[test]
fn shards_of_experts_add_up_with_adapters() {
    let mut spec = whole();
    spec.lora = Some(Lora { num_adapters: 2, rank: 3, format: WeightFormat::F32, delta: LoraDelta::F32 });
    let part = |first: usize, range: usize| MoeSpec {
        placement: Placement::Range { first: 6 * range, count: 6 },
        shard: TensorShard::Part { first, size: 12, owns_down_bias: first == 0 },
        common_terms: common(first + range == 0),
        ..spec.clone()
    };
    adds_up(&spec, &[part(0, 0), part(12, 0), part(0, 1), part(12, 1)], "experts and columns");
}

#[test]
fn cuts_that_leave_a_piece_without_scale_are_refused_by_name() {
    let act_order =
        WeightFormat::Int4 { group: Some(32), scale: ScaleFormat::F16, zero_points: false, act_order: true };
    let fp8 = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };
    for (format, first, field) in
        [(act_order, 0, "shard"), (WeightFormat::Q4K, 128, "shard"), (fp8, 200, "experts.format")]
    {
        let mut spec = deepseek_like();
        (spec.hidden_size, spec.experts.intermediate_size, spec.experts.format) = (256, 512, format);
        spec.shard = TensorShard::Part { first, size: 64, owns_down_bias: true };
        for said in [
            moewe::supports(&Cpu::new(), &spec, 4).unwrap_err().to_string(),
            moewe::supports(gpu(), &spec, 4).unwrap_err().to_string(),
        ] {
            assert!(said.contains(field) && said.contains("does not support"), "{said}");
        }
        // The reference reads each weight by itself.
        let layer = RandomLayer::new(spec, 3);
        layer.judge(layer.all_inputs(2, 3).view());
    }
}

#[test]
fn a_missing_expert_is_nan_and_counted_and_a_callers_table_brings_it_back() {
    let mut spec = deepseek_like();
    spec.shared = None;
    let table = |missing: &[i32]| -> Vec<i32> {
        let mut next = -1;
        (0..12)
            .map(|expert| {
                if missing.contains(&expert) {
                    -2
                } else {
                    next += 1;
                    next
                }
            })
            .collect()
    };
    spec.placement = Placement::Map { num_slots: 10, replicas: 1, slots: table(&[3, 8]) };
    let layer = RandomLayer::new(spec.clone(), 5);
    let inputs = layer.all_inputs(70, 6);
    fn run<B: Host>(backend: B, layer: &RandomLayer, options: &Options, inputs: &Inputs<'_>, slots: &[i32]) {
        let plan = Plan::new(backend, &layer.spec, &layer.weights(), 70, options).unwrap();
        let session = Session::new(plan, &layer.spec).unwrap();
        let outcome = session.run(inputs).unwrap();
        let misses = |session: &Session<B>| {
            let host = session.plan().backend();
            host.read(session.scratch().buffer(EXPERT_MISSES).unwrap()).unwrap()
        };
        let of = |expert: i32| outcome.topk_ids.iter().filter(|id| **id == expert).count() as u32;
        let want: Vec<u32> = (0..12).map(|expert| if [3, 8].contains(&expert) { of(expert) } else { 0 }).collect();
        assert!(want[3] > 0 && want[8] > 0);
        assert_eq!(misses(&session), want);
        for (token, row) in outcome.output.chunks(40).enumerate() {
            let missed = outcome.topk_ids[3 * token..3 * token + 3].iter().any(|id| [3, 8].contains(id));
            assert!(row.iter().all(|value| value.is_nan() == missed), "token {token}");
        }
        // Expert 0's slot for expert 3: the caller says that it has copied it there. 8 is elsewhere, 0 is gone.
        let mut moved = slots.to_vec();
        (moved[0], moved[3], moved[8]) = (-2, slots[0], -1);
        let host = session.plan().backend();
        let words = |values: &[i32]| values.iter().map(|value| *value as u32).collect::<Vec<u32>>();
        let given = host.upload("expert_slots", &words(&moved)).unwrap();
        let x = host.upload("x", &moewe::host::encode(FloatType::Bf16, inputs.hidden_states)).unwrap();
        let out = host.create_buffer("out", 4 * 70 * 40, false).unwrap();
        let io = Io { output: Some(&out), expert_slots: Some(&given), ..Io::of(&x) };
        let bound = session.plan().bind(&io, session.scratch()).unwrap();
        let mut encoder = host.encoder();
        bound.record(&mut encoder, &Tokens::Host(70)).unwrap();
        host.submit(encoder).unwrap();
        let now: Vec<u32> = (0..12).map(|expert| if expert == 0 { of(0) } else { 0 }).collect();
        assert_eq!(misses(&session), now);
        let output: Vec<f32> = host.read(&out).unwrap().into_iter().map(f32::from_bits).collect();
        for (token, row) in output.chunks(40).enumerate() {
            let missed = outcome.topk_ids[3 * token..3 * token + 3].contains(&0);
            assert!(row.iter().all(|value| value.is_nan() == missed), "token {token}");
        }
        // A table that names a slot which is not there: a fault, and never an index.
        let wild: Vec<i32> = (0..12).map(|at| [10, i32::MAX, -3, i32::MIN][at % 4]).collect();
        host.write(&given, 0, &words(&wild)).unwrap();
        let mut encoder = host.encoder();
        bound.record(&mut encoder, &Tokens::Host(70)).unwrap();
        host.submit(encoder).unwrap();
        assert!(host.read(&out).unwrap().into_iter().all(|word| f32::from_bits(word).is_nan()));
    }
    for options in [GEMV, TILED] {
        run(Cpu::new(), &layer, &options, &inputs.view(), &table(&[3, 8]));
        run(gpu().clone(), &layer, &options, &inputs.view(), &table(&[3, 8]));
    }
    check_inputs(&layer, 70, &AUTO, &inputs, "missing experts");
}

#[test]
fn batched_rows_are_the_experts_outputs() {
    for position in [WeightPosition::Output, WeightPosition::Input, WeightPosition::BeforeDown] {
        for options in [GEMV, TILED] {
            let mut spec = deepseek_like();
            (spec.shared, spec.router) = (None, Router::Given { transform: LogitTransform::None });
            spec.routing.weight_position = position;
            spec.experts.down_bias = true;
            // One expert a token with its weight: what a row of it is in a batch.
            let one = MoeSpec { top_k: 1, ..spec.clone() };
            let batched = MoeSpec { entry: Entry::Batched { capacity: 7 }, ..spec };
            let (one, batched) = (RandomLayer::new(one, 9), RandomLayer::new(batched, 9));
            let inputs = batched.all_inputs(0, 4);
            let counts = inputs.counts.clone().unwrap();
            assert!(counts.contains(&0) || counts.iter().any(|count| *count < 7));
            let exists = |row: usize| row % 7 < counts[row / 7] as usize;
            let rows: Vec<usize> = (0..84).filter(|row| exists(*row)).collect();
            let hidden_states: Vec<f32> =
                rows.iter().flat_map(|row| inputs.hidden_states[40 * row..40 * row + 40].to_vec()).collect();
            let topk_weights: Vec<f32> = match &inputs.row_weights {
                None => vec![1.0; rows.len()],
                Some(weights) => rows.iter().map(|row| weights[*row]).collect(),
            };
            let topk_ids = rows.iter().map(|row| (row / 7) as i32).collect();
            let routed = reference::Routed {
                logits: vec![],
                topk_ids,
                topk_weights,
                shared_weights: vec![],
                router_states: vec![],
            };
            let want = reference::experts(&one.spec, &one.weights(), Inputs::of(&hidden_states), &routed).unwrap();
            for (name, got) in outputs(&batched, &options, inputs.view()) {
                let existing: Vec<f32> = rows.iter().flat_map(|row| got[40 * row..40 * row + 40].to_vec()).collect();
                near(&want, &existing, &format!("{name}, {position:?}, {options:?}"));
                let others = (0..84).filter(|row| !exists(*row)).flat_map(|row| &got[40 * row..40 * row + 40]);
                assert!(others.into_iter().all(|value| *value == 0.0), "{name}: rows that do not exist are not 0");
            }
        }
    }
}

#[test]
fn the_routing_of_a_batched_entry_is_refused() {
    let mut spec = deepseek_like();
    (spec.shared, spec.router) = (None, Router::Given { transform: LogitTransform::None });
    let layer = RandomLayer::new(MoeSpec { entry: Entry::Batched { capacity: 7 }, ..spec.clone() }, 9);
    let said = Plan::routing(Cpu::new(), &layer.spec, &layer.weights().router, 4, &AUTO).err().unwrap().to_string();
    assert!(said.contains("entry"), "{said}");
    let mut with_shared = deepseek_like();
    with_shared.entry = Entry::Batched { capacity: 7 };
    with_shared.router = spec.router;
    let said = with_shared.validate().unwrap_err().to_string();
    assert!(said.contains("shared") && said.contains("Batched"), "{said}");
}

fn f32_matrix(bytes: &[u8], shape: [usize; 2]) -> moewe::Matrix<'_> {
    let tensor = moewe::Tensor { name: "merged".into(), dtype: Dtype::F32, shape: shape.to_vec(), bytes };
    let stored = Stored::Plain(&tensor);
    moewe::Matrix::view(stored, WeightFormat::F32, Orientation::OutIn, Rows::All, None, shape).unwrap()
}

/// W + B A in f32 is the same layer without an adapter.
#[test]
fn an_adapter_is_its_product_added_to_the_weights() {
    let mut spec = deepseek_like();
    spec.experts.format = WeightFormat::F32;
    spec.experts.gate_up_bias = true;
    spec.experts.down_bias = true;
    let adapted = MoeSpec {
        lora: Some(Lora { num_adapters: 3, rank: 5, format: WeightFormat::F32, delta: LoraDelta::F32 }),
        ..spec.clone()
    };
    for position in [WeightPosition::Output, WeightPosition::Input, WeightPosition::BeforeDown] {
        let with = |spec: &MoeSpec| {
            let mut spec = spec.clone();
            spec.routing.weight_position = position;
            RandomLayer::new(spec, 12)
        };
        let (plain, adapted) = (with(&spec), with(&adapted));
        let mut inputs = adapted.all_inputs(TOKENS, 5);
        for adapter in 0..3 {
            inputs.adapter_ids = Some(vec![adapter; TOKENS]);
            let lora = &adapted.weights().lora[adapter as usize];
            // Merged by plain loops.
            let merged = |matrix: &moewe::Matrix<'_>, b: &moewe::Matrix<'_>, a: &moewe::Matrix<'_>| -> Vec<u8> {
                let [rows, cols] = matrix.shape();
                let value = |row: usize, col: usize| {
                    let added: f64 = (0..5).map(|r| f64::from(b.get(row, r)) * f64::from(a.get(r, col))).sum();
                    (f64::from(matrix.get(row, col)) + added) as f32
                };
                (0..rows * cols).flat_map(|at| value(at / cols, at % cols).to_le_bytes()).collect()
            };
            let weights = plain.weights();
            let bytes: Vec<[Vec<u8>; 3]> = weights
                .experts
                .iter()
                .zip(lora)
                .map(|(mlp, lora)| {
                    [
                        merged(mlp.gate.as_ref().unwrap(), lora.gate_b.as_ref().unwrap(), &lora.gate_up_a),
                        merged(&mlp.up, &lora.up_b, &lora.gate_up_a),
                        merged(&mlp.down, &lora.down_b, &lora.down_a),
                    ]
                })
                .collect();
            let mut folded = weights.clone();
            for (mlp, bytes) in folded.experts.iter_mut().zip(&bytes) {
                mlp.gate = Some(f32_matrix(&bytes[0], [24, 40]));
                mlp.up = f32_matrix(&bytes[1], [24, 40]);
                mlp.down = f32_matrix(&bytes[2], [40, 24]);
            }
            let want = reference::layer(&plain.spec, &folded, Inputs::of(&inputs.hidden_states)).unwrap().output;
            let without = plain.judge(Inputs::of(&inputs.hidden_states)).output;
            let moved = want.iter().zip(&without).any(|(a, b)| (a - b).abs() > 0.05 * a.abs().max(1.0));
            assert!(moved, "the adapter does nothing");
            for options in [GEMV, TILED] {
                for (name, got) in outputs(&adapted, &options, inputs.view()) {
                    near(&want, &got, &format!("{name}, adapter {adapter}, {position:?}, {options:?}"));
                }
            }
        }
        // Without an adapter nothing is added, bit for bit.
        inputs.adapter_ids = Some(vec![-1; TOKENS]);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let want = plain.judge(Inputs::of(&inputs.hidden_states)).output;
        assert_eq!(bits(&want), bits(&adapted.judge(inputs.view()).output), "{position:?}");
    }
}

#[test]
fn an_adapter_that_nobody_has_makes_its_token_nan() {
    let mut spec = deepseek_like();
    spec.lora = Some(Lora { num_adapters: 2, rank: 3, format: WeightFormat::Bf16, delta: LoraDelta::Model });
    let layer = RandomLayer::new(spec, 12);
    let mut inputs = layer.all_inputs(TOKENS, 5);
    let bad = [2, -2, i32::MAX, i32::MIN];
    let ids = (0..TOKENS).map(|token| if token % 3 == 1 { bad[token / 3 % 4] } else { (token % 3) as i32 - 1 });
    inputs.adapter_ids = Some(ids.collect());
    for options in [GEMV, TILED] {
        for (name, output) in outputs(&layer, &options, inputs.view()) {
            for (token, row) in output.chunks(40).enumerate() {
                let wrong = token % 3 == 1;
                assert!(row.iter().all(|value| value.is_nan() == wrong), "{name}, token {token}, {options:?}");
            }
        }
    }
}

/// Every format, each kind of quantised rows, with several adapters and chunks.
#[test]
fn adapters_stand_beside_every_format() {
    for (at, format) in crate::random::FORMATS.into_iter().enumerate() {
        for quant in [
            ActivationQuant::None,
            ActivationQuant::dynamic_fp8(64, ActivationScale::F32),
            ActivationQuant::Static { code: ActivationCode::Int8 },
        ] {
            if quant.is_on() && !crate::random::sums_codes(format) {
                continue;
            }
            let mut spec = deepseek_like();
            (spec.hidden_size, spec.experts.intermediate_size) = (256, 256);
            (spec.experts.format, spec.experts.activation_quant) = (format, quant);
            let delta = [LoraDelta::F32, LoraDelta::Model][at % 2];
            let adapters = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16][at % 3];
            spec.lora = Some(Lora { num_adapters: 2, rank: 8, format: adapters, delta });
            spec.routing.weight_position =
                [WeightPosition::Output, WeightPosition::Input, WeightPosition::BeforeDown][at / 2 % 3];
            let options = [GEMV, TILED][at % 2];
            check(&RandomLayer::new(spec, 14), 5, &options, &format!("{format:?}, {quant:?}"));
        }
    }
}

#[test]
fn parts_that_cannot_be_are_refused_with_their_field() {
    let spec = deepseek_like();
    let with = |change: &dyn Fn(&mut MoeSpec)| {
        let mut spec = spec.clone();
        change(&mut spec);
        match spec.validate().unwrap_err() {
            Error::Invalid { field, .. } => field.into_owned(),
            other => panic!("{other}"),
        }
    };
    let map = |num_slots, replicas, slots: &[i32]| {
        let slots = slots.to_vec();
        with(&move |spec: &mut MoeSpec| {
            spec.placement = Placement::Map { num_slots, replicas, slots: slots.clone() };
        })
    };
    assert_eq!(with(&|spec| spec.placement = Placement::Range { first: 5, count: 8 }), "placement");
    assert_eq!(with(&|spec| spec.placement = Placement::Range { first: 5, count: 0 }), "placement");
    assert_eq!(with(&|spec| spec.placement = Placement::Range { first: usize::MAX, count: 2 }), "placement");
    assert_eq!(map(12, 1, &[0; 11]), "placement.slots");
    assert_eq!(map(1, 1, &[0; 12]), "placement.slots", "two experts in one slot");
    assert_eq!(map(2, 1, &[0, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]), "placement.slots", "an empty slot");
    assert_eq!(map(1, 1, &[0, -1, -3, -1, -1, -1, -1, -1, -1, -1, -1, -1]), "placement.slots");
    assert_eq!(map(1, 1, &[0, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]), "placement.slots");
    let mut half_here = vec![-1; 24];
    half_here[0] = 0;
    assert_eq!(map(1, 2, &half_here), "placement.slots");
    assert_eq!(map(0, 1, &[-1; 12]), "placement.num_slots");
    assert_eq!(map(1, 0, &[]), "placement.slots");
    let part = |first, size| TensorShard::Part { first, size, owns_down_bias: true };
    assert_eq!(with(&|spec| spec.shard = part(20, 5)), "shard");
    assert_eq!(with(&|spec| spec.shard = part(0, 0)), "shard");
    assert_eq!(with(&|spec| spec.common_terms = CommonTerms::Elsewhere), "common_terms");
    assert_eq!(
        with(&|spec| {
            spec.shard = part(0, 5);
            spec.output_norm = Some(OutputNorm { eps: 1e-5 });
        }),
        "output_norm"
    );
    assert_eq!(
        with(&|spec| {
            spec.placement = Placement::Range { first: 0, count: 5 };
            spec.latent = Some(Latent { size: 8, format: WeightFormat::F32, norm: LatentNorm::Reduced { eps: 1e-5 } });
        }),
        "latent.norm"
    );
    assert_eq!(with(&|spec| spec.entry = Entry::Batched { capacity: 0 }), "entry.capacity");
    assert_eq!(with(&|spec| spec.entry = Entry::Batched { capacity: 3 }), "router");
    let lora = |num_adapters, rank, format| Some(Lora { num_adapters, rank, format, delta: LoraDelta::F32 });
    assert_eq!(with(&|spec| spec.lora = lora(0, 3, WeightFormat::F32)), "lora.num_adapters");
    assert_eq!(with(&|spec| spec.lora = lora(1 << 20, 3, WeightFormat::F32)), "lora.num_adapters");
    assert_eq!(with(&|spec| spec.lora = lora(1, 0, WeightFormat::F32)), "lora.rank");
    assert_eq!(with(&|spec| spec.lora = lora(1, 3, WeightFormat::Fp8Tensor)), "lora.format");
}
