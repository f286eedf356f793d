//! Stages without a layer: what they leave is what `numerics` says, on every backend, and the device is in lockstep with
//! the twin. (The routing alone: `routing`.)

use moewe::host::{self, Host};
use moewe::kernels::{Activated, ScaleLayout, ValueSource};
use moewe::numerics::{self, SpanScale};
use moewe::schedule::{Codes, SCALES, StageSpec};
use moewe::spec::*;
use moewe::{Backend, Cpu, Io, Plan, Scratch, Tokens};

use crate::rig::gpu;

const ROWS: usize = 37;

/// Rows of every magnitude, some of zeros.
fn values(count: usize) -> Vec<f32> {
    let value = |at: usize| match at % 97 {
        0..5 => 0.0,
        _ => ((at * 7919 % 1009) as f32 / 504.5 - 1.0) * 2f32.powi((at / 13 % 9) as i32 - 3),
    };
    (0..count).map(value).collect()
}

fn gate_up(activation: Activation, weighted: bool) -> ValueSource {
    let (gate_up, rounding) = (Rounding::F32, ActivationRounding::F32);
    ValueSource::Activated(Activated { activation, gate_up, rounding, weighted })
}

fn dynamic(code: ActivationCode, span: ScaleSpan, scale: ActivationScale) -> ActivationQuant {
    ActivationQuant::Dynamic { code, span, rule: ScaleRule::FlooredAmax, scale }
}

/// What leaves a stage: f32 values or codes, and scales by row and span.
#[derive(Debug, PartialEq)]
struct Left {
    words: Vec<u32>,
    scales: Vec<f32>,
}

/// What enters, in f32 and as words.
fn enters(spec: &StageSpec) -> (Vec<f32>, Vec<u32>) {
    let (count, float_type) = match spec.source {
        ValueSource::Rows { input, .. } => (ROWS * spec.cols, input),
        ValueSource::Activated(activated) => {
            (ROWS * spec.cols * if activated.activation.gated() { 2 } else { 1 }, FloatType::F32)
        }
    };
    let words = host::encode(float_type, &values(count));
    (host::decode(float_type, &words, count), words)
}

fn row_weights() -> Vec<f32> {
    (0..ROWS).map(|row| 0.25 + row as f32 / 64.0).collect()
}

fn weighted(spec: &StageSpec) -> bool {
    match spec.source {
        ValueSource::Rows { weigh, .. } => weigh.is_some(),
        ValueSource::Activated(activated) => activated.weighted,
    }
}

fn run<B: Host + Clone>(backend: &B, spec: &StageSpec, tokens: usize) -> Left {
    let plan = Plan::stage(backend.clone(), spec, ROWS).unwrap();
    let scratch = Scratch::new(backend, &plan.scratch_layout()).unwrap();
    let rows = backend.upload("rows", &enters(spec).1).unwrap();
    let weights = backend.upload("weights", &host::encode(FloatType::F32, &row_weights())).unwrap();
    let row_words = if spec.codes.is_some() { spec.cols.div_ceil(4) } else { spec.cols };
    let out = backend.create_buffer("out", 4 * (ROWS * row_words) as u64, false).unwrap();
    let io = Io { output: Some(&out), topk_weights: weighted(spec).then_some(&weights), ..Io::of(&rows) };
    let bound = plan.bind(&io, &scratch).unwrap();
    let mut encoder = backend.encoder();
    bound.record(&mut encoder, &Tokens::Host(tokens)).unwrap();
    backend.submit(encoder).unwrap();
    let words = backend.read(&out).unwrap()[..tokens * row_words].to_vec();
    let scales = match (spec.codes, scratch.buffer(SCALES)) {
        (Some(Codes { quant, layout }), Some(buffer)) => {
            let (words, spans) = (backend.read(buffer).unwrap(), spans(spec.cols, quant));
            let one = |at: usize| layout.read(&words, at / spans, at % spans, spans);
            (0..tokens * spans).map(one).collect()
        }
        _ => vec![],
    };
    Left { words, scales }
}

fn spans(cols: usize, quant: ActivationQuant) -> usize {
    match quant {
        ActivationQuant::Dynamic { span: ScaleSpan::Group(group), .. } => cols.div_ceil(group),
        _ => 1,
    }
}

/// The values that a stage computes, by the functions that the reference uses.
fn computed(spec: &StageSpec, tokens: usize) -> Vec<f32> {
    let (values, _) = enters(spec);
    let weight = |row: usize| if weighted(spec) { row_weights()[row] } else { 1.0 };
    let one = |at: usize| match spec.source {
        ValueSource::Rows { .. } => values[at] * weight(at / spec.cols),
        ValueSource::Activated(activated) => {
            let pair = if activated.activation.gated() { 2 } else { 1 };
            let [gate, up] =
                numerics::activate_parts(activated.activation, values[pair * at], values[pair * at + pair - 1]);
            gate * up * weight(at / spec.cols)
        }
    };
    (0..tokens * spec.cols).map(one).collect()
}

fn expected(spec: &StageSpec, tokens: usize) -> Left {
    let values = computed(spec, tokens);
    let Some(Codes { quant: ActivationQuant::Dynamic { code, span, rule, scale }, .. }) = spec.codes else {
        return Left { words: host::encode(FloatType::F32, &values), scales: vec![] };
    };
    let width = match span {
        ScaleSpan::Group(group) => group,
        ScaleSpan::Token | ScaleSpan::Tensor => spec.cols,
    };
    let whole = SpanScale::dynamic(code, rule, scale, numerics::largest_magnitude(&values));
    let (mut words, mut scales) = (vec![], vec![]);
    for row in values.chunks(spec.cols) {
        let mut bytes: Vec<u8> = vec![];
        for values in row.chunks(width) {
            let own = SpanScale::dynamic(code, rule, scale, numerics::largest_magnitude(values));
            let scale = if span == ScaleSpan::Tensor { whole } else { own };
            scales.push(scale.scale);
            bytes.extend(values.iter().map(|value| scale.encode(code, *value)));
        }
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        words.extend(bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())));
    }
    Left { words, scales }
}

/// Stages without an exponential: exact on every device.
fn exact() -> Vec<StageSpec> {
    let (e4m3, int8) = (ActivationCode::E4m3, ActivationCode::Int8);
    let (f32_scale, packed) = (ActivationScale::F32, ActivationScale::Ue8m0Packed);
    let relu2 = |weighted| gate_up(Activation::Relu2, weighted);
    let rows = |input| ValueSource::Rows { input, divisor: 1, weigh: None };
    let of = |source, cols, quant, layout| {
        let codes = Some(Codes { quant, layout });
        StageSpec { source, cols, codes, model: FloatType::Bf16 }
    };
    let by_column = ScaleLayout::ColumnMajor { stride: 40 };
    let mut all = vec![];
    for input in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        all.extend([
            of(rows(input), 96, dynamic(e4m3, ScaleSpan::Group(32), f32_scale), ScaleLayout::RowMajor),
            of(rows(input), 70, dynamic(e4m3, ScaleSpan::Group(32), f32_scale), by_column),
            of(rows(input), 97, dynamic(int8, ScaleSpan::Token, f32_scale), ScaleLayout::RowMajor),
            of(rows(input), 33, dynamic(e4m3, ScaleSpan::Tensor, f32_scale), ScaleLayout::RowMajor),
            of(rows(input), 640, dynamic(e4m3, ScaleSpan::Group(128), packed), ScaleLayout::Packed),
        ]);
    }
    let weighed = ValueSource::Rows { input: FloatType::Bf16, divisor: 1, weigh: Some(Rounding::F32) };
    all.push(of(weighed, 64, dynamic(e4m3, ScaleSpan::Group(16), f32_scale), ScaleLayout::RowMajor));
    all.push(of(relu2(false), 64, dynamic(int8, ScaleSpan::Token, f32_scale), ScaleLayout::RowMajor));
    all.push(of(relu2(true), 72, dynamic(e4m3, ScaleSpan::Group(24), f32_scale), by_column));
    all.push(StageSpec { source: relu2(true), cols: 31, codes: None, model: FloatType::F32 });
    all
}

#[test]
fn quantisation_alone_gives_the_codes_and_scales_of_numerics() {
    for spec in exact() {
        for tokens in [ROWS, 1, 0] {
            let want = expected(&spec, tokens);
            assert_eq!(run(&Cpu::new(), &spec, tokens), want, "cpu: {spec:?}");
            assert_eq!(run(gpu(), &spec, tokens), want, "wgpu: {spec:?}");
        }
    }
}

#[test]
fn an_activation_alone_is_that_of_the_reference_clamp_and_all() {
    let (swiglu, oai) =
        (Activation::Swiglu { limit: None }, |limit| Activation::SwigluOai { alpha: 1.702, limit, beta: 1.0 });
    for (activation, without_limit) in [
        (Activation::Swiglu { limit: Some(2.0) }, Some(swiglu)),
        (swiglu, None),
        (Activation::SwigluClampAfter { limit: 3.0 }, Some(swiglu)),
        (oai(Some(2.0)), Some(oai(None))),
        (Activation::Situ { beta: 4.0, linear_beta: 25.0 }, Some(swiglu)),
        (Activation::GeluTanh, None),
        (Activation::GeluErf, None),
    ] {
        for weighted in [false, true] {
            let source = gate_up(activation, weighted);
            let spec = StageSpec { source, cols: 50, codes: None, model: FloatType::F32 };
            let want = computed(&spec, ROWS);
            let floats = |left: Left| host::decode(FloatType::F32, &left.words, want.len());
            assert_eq!(run(&Cpu::new(), &spec, ROWS), expected(&spec, ROWS), "cpu: {activation:?}");
            // The device's exponential errs by a few ulp of a value, and where 1 + tanh cancels of gate times up.
            let (entering, _) = enters(&spec);
            let product = |at: usize| (entering[2 * at] * entering[2 * at + 1]).abs();
            let allowed = |(at, want): (usize, &f32)| 1e-5 * want.abs() + 2e-7 * product(at) + 1e-6;
            let got = floats(run(gpu(), &spec, ROWS));
            let mut pairs = got.iter().zip(want.iter().enumerate());
            let wrong = pairs.find(|(got, want)| (*got - want.1).abs() > allowed(*want));
            assert_eq!(wrong, None, "wgpu: {activation:?}");
            // A bound that is dropped would show.
            let unbounded = without_limit.map(|activation| gate_up(activation, weighted));
            let unbounded = unbounded.map(|source| computed(&StageSpec { source, ..spec.clone() }, ROWS));
            assert_ne!(unbounded.as_ref(), Some(&want), "{activation:?}");
        }
    }
}

#[test]
fn clamped_swiglu_and_its_codes_in_one_step_equal_the_two_steps() {
    let quant = ActivationQuant::dynamic_fp8(32, ActivationScale::F32CeilPow2);
    let codes = Some(Codes { quant, layout: ScaleLayout::RowMajor });
    let source = gate_up(Activation::Swiglu { limit: Some(7.0) }, false);
    let fused = StageSpec { source, cols: 96, codes, model: FloatType::F32 };
    fn two_steps<B: Host + Clone>(backend: &B, fused: &StageSpec) -> Left {
        let activation = StageSpec { codes: None, ..fused.clone() };
        let first = run(backend, &activation, ROWS);
        let rows = ValueSource::Rows { input: FloatType::F32, divisor: 1, weigh: None };
        let second = StageSpec { source: rows, ..fused.clone() };
        let plan = Plan::stage(backend.clone(), &second, ROWS).unwrap();
        let scratch = Scratch::new(backend, &plan.scratch_layout()).unwrap();
        let rows = backend.upload("rows", &first.words).unwrap();
        let out = backend.create_buffer("out", (ROWS * 96) as u64, false).unwrap();
        let bound = plan.bind(&Io { output: Some(&out), ..Io::of(&rows) }, &scratch).unwrap();
        let mut encoder = backend.encoder();
        bound.record(&mut encoder, &Tokens::Host(ROWS)).unwrap();
        backend.submit(encoder).unwrap();
        let scales = backend.read(scratch.buffer(SCALES).unwrap()).unwrap();
        let scales = scales[..ROWS * 3].iter().map(|word| f32::from_bits(*word)).collect();
        Left { words: backend.read(&out).unwrap(), scales }
    }
    assert_eq!(run(&Cpu::new(), &fused, ROWS), expected(&fused, ROWS));
    assert_eq!(two_steps(&Cpu::new(), &fused), expected(&fused, ROWS));
    assert_eq!(run(gpu(), &fused, ROWS), two_steps(gpu(), &fused));
}

#[test]
fn a_stage_that_cannot_be_is_refused_by_name() {
    let source = ValueSource::Rows { input: FloatType::F32, divisor: 1, weigh: None };
    let quant = ActivationQuant::dynamic_fp8(32, ActivationScale::F32);
    let codes = |quant, layout| Some(Codes { quant, layout });
    let good = StageSpec { source, cols: 64, codes: codes(quant, ScaleLayout::RowMajor), model: FloatType::F32 };
    let refused = |spec: StageSpec, max_tokens: usize, says: &str| {
        let said = Plan::stage(Cpu::new(), &spec, max_tokens).err().expect(says).to_string();
        assert!(said.contains(says), "{says}: {said}");
    };
    let with = |quant, layout| StageSpec { codes: codes(quant, layout), ..good.clone() };
    refused(good.clone(), 0, "max_tokens");
    refused(StageSpec { cols: 0, ..good.clone() }, 1, "stage");
    refused(StageSpec { codes: None, ..good.clone() }, 1, "codes: found None");
    let divided = ValueSource::Rows { input: FloatType::F32, divisor: 2, weigh: None };
    refused(StageSpec { source: divided, ..good.clone() }, 1, "source.divisor");
    refused(with(ActivationQuant::None, ScaleLayout::RowMajor), 1, "codes.quant");
    let fixed = ActivationQuant::Static { code: ActivationCode::E4m3 };
    refused(with(fixed, ScaleLayout::RowMajor), 1, "cpu does not support codes.quant");
    refused(with(quant, ScaleLayout::Packed), 1, "codes.layout: found Packed, expected RowMajor or ColumnMajor");
    refused(with(quant, ScaleLayout::ColumnMajor { stride: 4 }), 9, "a stride of at least max_tokens = 9");
    let packed = ActivationQuant::dynamic_fp8(32, ActivationScale::Ue8m0Packed);
    refused(with(packed, ScaleLayout::RowMajor), 1, "expected Packed");
    let odd = ActivationQuant::dynamic_fp8(30, ActivationScale::F32);
    refused(with(odd, ScaleLayout::RowMajor), 1, "a multiple of 4");
    let endless = gate_up(Activation::Swiglu { limit: Some(f32::NAN) }, false);
    refused(StageSpec { source: endless, codes: None, ..good.clone() }, 1, "NaN");
    // Larger than a binding of a device: 2^24 rows of 64 values.
    let backend = gpu().with_binding_limit(1 << 31);
    let refusal = format!("{} does not support max_tokens", backend.facts().backend);
    let said = Plan::stage(backend, &good, 1 << 24).err().unwrap().to_string();
    assert!(said.contains(&refusal) && said.contains("rows needs"), "{said}");
}
