//! What `plan`, `bind` and `record` refuse, and the seams that engines use.

use moewe::host::Host;
use moewe::reference::Inputs;
use moewe::{Backend, Cpu, Error, Io, Plan, Scratch, Tokens};

use crate::rig::{AUTO, RandomLayer, deepseek_like, gpu, wgpu};

fn message<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("this must be refused"),
        Err(error) => error.to_string(),
    }
}

/// The same checks on each backend.
fn refusals<B: Host + Clone>(backend: &B) {
    let layer = RandomLayer::new(deepseek_like(), 41);
    let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 8, &AUTO).unwrap();
    let scratch = Scratch::new(backend, &plan.scratch_layout()).unwrap();
    let buffer = |bytes: u64| backend.create_buffer("test", bytes, false).unwrap();
    let (x, y) = (buffer(8 * 80), buffer(8 * 160));
    fn io<'a, B: Backend>(hidden_states: &'a B::Buffer, output: Option<&'a B::Buffer>) -> Io<'a, B> {
        Io { output, ..Io::of(hidden_states) }
    }
    let alias = message(plan.bind(&io(&y, Some(&y)), &scratch));
    assert!(alias.contains("output") && alias.contains("also hidden_states"), "{alias}");
    let missing = message(plan.bind(&io(&x, None), &scratch));
    assert!(missing.contains("output") && missing.contains("no buffer"), "{missing}");
    let short = message(plan.bind(&io(&buffer(40), Some(&y)), &scratch));
    assert!(short.contains("hidden_states") && short.contains("40 bytes") && short.contains("80 bytes"), "{short}");
    let empty = message(plan.bind(&io(&x, Some(&y)), &Scratch::from_buffers(vec![])));
    assert!(empty.contains("topk_ids"), "{empty}");
    let surplus = message(plan.bind(&Io { token_ids: Some(&buffer(32)), ..io(&x, Some(&y)) }, &scratch));
    assert!(surplus.contains("token_ids") && surplus.contains("pass None"), "{surplus}");
    // Buffers of three tokens bind; four tokens are then refused.
    let (x3, y3) = (buffer(3 * 80), buffer(3 * 160));
    let bound = plan.bind(&io(&x3, Some(&y3)), &scratch).unwrap();
    assert_eq!(bound.max_tokens(), 3);
    let many = message(bound.record(&mut backend.encoder(), &Tokens::Host(4)));
    assert!(many.contains("tokens") && many.contains("found 4") && many.contains("at most 3"), "{many}");
    let none = message(Plan::new(backend.clone(), &layer.spec, &layer.weights(), 0, &AUTO));
    assert!(none.contains("max_tokens"), "{none}");
}

#[test]
fn calls_that_break_a_rule_are_refused_with_what_was_found_and_expected() {
    refusals(&Cpu::new());
    refusals(gpu());
}

/// An engine that routes itself, an expert cache, an all-to-all: ids and weights are the caller's.
fn seam<B: Host + Clone>(backend: &B) {
    let layer = RandomLayer::new(deepseek_like(), 42);
    let tokens = 5;
    let (hidden_states, _) = layer.inputs(tokens, 43);
    let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), tokens, &AUTO).unwrap();
    let scratch = Scratch::new(backend, &plan.scratch_layout()).unwrap();
    let x = backend.upload("x", &moewe::host::encode(layer.spec.precision.input, &hidden_states)).unwrap();
    let y = backend.create_buffer("y", 4 * 40 * tokens as u64, false).unwrap();
    let ids = backend.create_buffer("ids", 4 * 3 * tokens as u64, false).unwrap();
    let weights = backend.create_buffer("weights", 4 * 3 * tokens as u64, false).unwrap();
    let io = Io { output: Some(&y), topk_ids: Some(&ids), topk_weights: Some(&weights), ..Io::of(&x) };
    let bound = plan.bind(&io, &scratch).unwrap();
    let mut encoder = backend.encoder();
    bound.record_routing(&mut encoder, &Tokens::Host(tokens)).unwrap();
    backend.submit(encoder).unwrap();
    let want = layer.reference(&hidden_states, None);
    let routed: Vec<i32> = bytemuck::cast_vec(backend.read(&ids).unwrap());
    assert_eq!(routed, want.routed.topk_ids);

    // The caller drops the first slot of each token, as a padding id does.
    let dropped: Vec<u32> =
        routed.iter().enumerate().map(|(at, &id)| if at % 3 == 0 { u32::MAX } else { id as u32 }).collect();
    backend.write(&ids, 0, &dropped).unwrap();
    let mut encoder = backend.encoder();
    bound.record_experts(&mut encoder, &Tokens::Host(tokens)).unwrap();
    backend.submit(encoder).unwrap();
    let with_dropped: Vec<f32> = bytemuck::cast_vec(backend.read(&y).unwrap());
    // Without its first expert, a token's row is the full row less that expert's weighted part; the
    // part itself is what changes when only that slot is kept, plus the shared expert in both.
    let kept: Vec<u32> =
        routed.iter().enumerate().map(|(at, &id)| if at % 3 == 0 { id as u32 } else { u32::MAX }).collect();
    backend.write(&ids, 0, &kept).unwrap();
    let mut encoder = backend.encoder();
    bound.record_experts(&mut encoder, &Tokens::Host(tokens)).unwrap();
    backend.submit(encoder).unwrap();
    let with_kept: Vec<f32> = bytemuck::cast_vec(backend.read(&y).unwrap());
    backend.write(&ids, 0, &vec![u32::MAX; 3 * tokens]).unwrap();
    let mut encoder = backend.encoder();
    bound.record_experts(&mut encoder, &Tokens::Host(tokens)).unwrap();
    backend.submit(encoder).unwrap();
    let shared_only: Vec<f32> = bytemuck::cast_vec(backend.read(&y).unwrap());
    for at in 0..want.output.len() {
        let whole = with_dropped[at] + with_kept[at] - shared_only[at];
        assert!((whole - want.output[at]).abs() < 1e-4, "{at}: {whole} {}", want.output[at]);
    }
}

#[test]
fn ids_and_weights_may_be_the_callers() {
    seam(&Cpu::new());
    seam(gpu());
}

#[test]
fn layers_share_one_scratch() {
    let first = RandomLayer::new(deepseek_like(), 44);
    let mut wider = deepseek_like();
    wider.experts.intermediate_size = 50;
    wider.shared = None;
    let second = RandomLayer::new(wider, 45);
    let backend = gpu();
    let plans =
        [&first, &second].map(|layer| Plan::new(backend.clone(), &layer.spec, &layer.weights(), 9, &AUTO).unwrap());
    let layout = plans[0].scratch_layout().union(&plans[1].scratch_layout());
    assert!(layout.bytes() < plans[0].scratch_layout().bytes() + plans[1].scratch_layout().bytes());
    let scratch = Scratch::new(backend, &layout).unwrap();
    let x = backend.create_buffer("x", 9 * 80, false).unwrap();
    let outputs = [0, 1].map(|_| backend.create_buffer("y", 9 * 160, false).unwrap());
    let (hidden_states, _) = first.inputs(9, 46);
    backend.write(&x, 0, &moewe::host::encode(first.spec.precision.input, &hidden_states)).unwrap();
    // Both layers in one encoder.
    let mut encoder = backend.encoder();
    for (plan, output) in plans.iter().zip(&outputs) {
        let io = Io { output: Some(output), ..Io::of(&x) };
        plan.bind(&io, &scratch).unwrap().record(&mut encoder, &Tokens::Host(9)).unwrap();
    }
    backend.submit(encoder).unwrap();
    for (layer, output) in [&first, &second].into_iter().zip(&outputs) {
        let got: Vec<f32> = bytemuck::cast_vec(backend.read(output).unwrap());
        let want = layer.reference(&hidden_states, None).output;
        let close = got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-4);
        assert!(close);
    }
}

#[test]
fn a_host_that_catches_errors_itself_sees_none_of_ours() {
    // A refused call of ours must come back as our error, not through the host's handler, which panics.
    let backend = wgpu();
    let too_large = backend.create_buffer("too large", 1 << 50, false);
    let text = message(too_large);
    assert!(text.starts_with("wgpu: creating buffer too large"), "{text}");
    let storage_less = backend.device().create_buffer(&moewe::wgpu::BufferDescriptor {
        label: None,
        size: 640,
        usage: moewe::wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let layer = RandomLayer::new(deepseek_like(), 47);
    let plan = Plan::new(backend.clone(), &layer.spec, &layer.weights(), 8, &AUTO).unwrap();
    let scratch = Scratch::new(backend, &plan.scratch_layout()).unwrap();
    let y = backend.create_buffer("y", 8 * 160, false).unwrap();
    let io = Io { output: Some(&y), ..Io::of(&storage_less) };
    let text = message(plan.bind(&io, &scratch));
    assert!(text.starts_with("wgpu: binding buffers"), "{text}");
}

#[test]
fn inputs_of_the_wrong_size_are_refused() {
    let layer = RandomLayer::new(deepseek_like(), 48);
    let session = layer.on_cpu(2, &AUTO, None);
    let inputs = |hidden_states| Inputs::of(hidden_states);
    assert!(message(session.run(&inputs(&[0.0; 41]))).contains("whole rows of 40"));
    assert!(message(session.run(&inputs(&[0.0; 120]))).contains("at most 2 tokens"));
}
