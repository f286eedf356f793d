//! Random damage to small checkpoints of every kind: each gives a result or a typed error, within bounded memory.
//!
//! `MOEWE_MUTATIONS=1000000` runs so many, however long it takes; `MOEWE_MUTATION=I` runs the I-th alone.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use fastrand::Rng;
use moewe::checkpoint::Checkpoint;
use moewe::families::{Request, resolve, resolve_router};
use moewe::spec::{GateUpLayout, Orientation, ScaleFormat, WeightFormat};
use moewe::weights::{Dtype, Matrix, MlpWeights, MoeWeights, RouterWeights, Rows, Stored, Tensor};
use serde_json::{Value, json};

use crate::family_specs::samples;
use crate::gguf::converted;
use crate::gguf_file::{MXFP4, Q4_K, Q6_K, Q8_0, qwen, qwen_config};
use crate::memory::peak;
use crate::samples::{ANY, Sample, golden};

/// Of a run in CI; fewer if they take longer than this.
const USUAL: u64 = 100_000;
const LONGEST: Duration = Duration::from_secs(120);
const LEAST: u64 = 5_000;

/// A checkpoint that is whole.
struct Whole {
    name: String,
    config: Value,
    shard: &'static str,
    file: Vec<u8>,
    /// Bytes before the first tensor.
    header: usize,
}

impl Whole {
    fn of(name: String, config: Value, shard: &'static str, file: Vec<u8>) -> Self {
        let whole = Self { name, config, shard, header: 0, file };
        let checkpoint = whole.open(&whole.config.to_string(), whole.file.clone()).unwrap();
        let header = whole.file.len() - usize::try_from(checkpoint.bytes()).unwrap();
        Self { header, ..whole }
    }

    fn open(&self, config: &str, file: Vec<u8>) -> moewe::Result<Checkpoint> {
        Checkpoint::from_bytes(config, vec![(self.shard.into(), Cow::Owned(file))])
    }
}

/// Small ones of each family in both containers, and larger ones with quantised weights.
fn wholes() -> [Vec<Whole>; 2] {
    let (mut small, mut large) = (vec![], vec![]);
    for sample in samples() {
        let config = Value::Object(sample.config.clone());
        let name = config["model_type"].as_str().unwrap().to_owned();
        let checkpoint = sample.open();
        let resolved = resolve(&checkpoint, &ANY).unwrap();
        let gguf = converted(&resolved, &resolved.weights(&checkpoint).unwrap()).build();
        small.push(Whole::of(name.clone(), config.clone(), "w.safetensors", sample.file()));
        small.push(Whole::of(name, config, "w.gguf", gguf));
    }
    let mut rng = Rng::with_seed(0);
    for (kind, size) in [(Q8_0, 32), (MXFP4, 32), (Q4_K, 256), (Q6_K, 256)] {
        let file = qwen(size, [kind; 3], &mut rng).build();
        let to = if size == 32 { &mut small } else { &mut large };
        to.push(Whole::of(format!("type {kind}"), qwen_config(size), "w.gguf", file));
    }
    for case in std::fs::read_dir(golden("")).unwrap() {
        let case = case.unwrap().file_name().into_string().unwrap();
        if golden(&case).join("weights.safetensors").exists() && !case.starts_with("prim") {
            let sample = Sample::golden(&case);
            large.push(Whole::of(case, Value::Object(sample.config.clone()), "w.safetensors", sample.file()));
        }
    }
    [small, large]
}

/// Numbers at the edges of types and of what the crate accepts.
fn extreme(rng: &mut Rng) -> u64 {
    let edge = 1_u64 << rng.u32(0..64);
    match rng.u8(0..4) {
        0 => edge,
        1 => edge - 1,
        2 => edge.wrapping_neg(),
        _ => rng.u64(0..300),
    }
}

fn extreme_value(rng: &mut Rng) -> Value {
    match rng.u8(0..14) {
        0 => Value::Null,
        1 => json!(rng.bool()),
        2 => json!([]),
        3 => json!({}),
        4 => json!([null, "moe", 0, -1, 1.5]),
        5 => json!(vec![rng.u8(0..3); rng.usize(0..6)]),
        6 => json!("silu"),
        7 => json!("\u{0}\u{ffff}"),
        8 => json!(-1),
        9 => json!(f64::from_bits(rng.u64(..) & !(1 << 62))),
        10 => json!([1e300, 1e-300, -0.0, 3.4e38][rng.usize(0..4)]),
        _ => json!(extreme(rng)),
    }
}

/// Changes a value somewhere in the tree.
fn mutate_value(value: &mut Value, rng: &mut Rng) {
    match value {
        Value::Object(map) if !map.is_empty() && rng.u8(0..10) > 0 => {
            // Most nulls are of keys that nobody reads.
            let mut any = || map.iter().nth(rng.usize(0..map.len())).unwrap();
            let (mut key, mut found) = any();
            for _ in 0..8 {
                if found.is_null() {
                    (key, found) = any();
                }
            }
            let key = key.clone();
            match rng.u8(0..8) {
                0 => drop(map.remove(&key)),
                1 => {
                    let other = map.values().nth(rng.usize(0..map.len())).unwrap().clone();
                    map.insert(key, other);
                }
                2 => {
                    let moved = map.remove(&key).unwrap();
                    map.insert(format!("{key}{}", rng.u8(0..3)), moved);
                }
                3..=5 => drop(map.insert(key, extreme_value(rng))),
                _ => mutate_value(&mut map[&key], rng),
            }
        }
        Value::Array(list) if !list.is_empty() && rng.u8(0..4) > 0 => {
            let at = rng.usize(0..list.len());
            match rng.u8(0..4) {
                0 => drop(list.remove(at)),
                1 => list.push(list[at].clone()),
                _ => mutate_value(&mut list[at], rng),
            }
        }
        other => *other = extreme_value(rng),
    }
}

/// Damages bytes, mostly among the first `header`.
fn mutate_bytes(bytes: &mut Vec<u8>, header: usize, rng: &mut Rng) {
    let within = |bytes: &Vec<u8>, rng: &mut Rng| {
        let limit = if rng.u8(0..8) > 0 { header.min(bytes.len()) } else { bytes.len() };
        rng.usize(0..=limit)
    };
    let at = within(bytes, rng);
    let most = *rng.choice(&[4, 40, 400]).unwrap();
    let end = (at + rng.usize(0..=most)).min(bytes.len());
    match rng.u8(0..11) {
        0 => bytes.truncate(at),
        1 => bytes.extend((0..rng.usize(0..100)).map(|_| rng.u8(..))),
        2 => drop(bytes.drain(at..end)),
        3 => {
            let taken = bytes[at..end].to_vec();
            let to = within(bytes, rng);
            bytes.splice(to..to, taken);
        }
        4 => {
            let taken = bytes[at..end].to_vec();
            let to = within(bytes, rng).min(bytes.len() - taken.len());
            bytes[to..to + taken.len()].copy_from_slice(&taken);
        }
        5 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(0..8),
        6 => bytes[at..end].fill(*rng.choice(&[0, 0xff, b'9', b'{', b'[', b'"']).unwrap()),
        // A number in binary.
        7 | 8 => {
            let number = extreme(rng).to_le_bytes();
            let width = *rng.choice(&[1, 2, 4, 8]).unwrap();
            let width = width.min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&number[..width]);
        }
        // A number in text.
        9 | 10 => {
            let digit = |byte: &u8| byte.is_ascii_digit();
            if let Some(from) = bytes[at..header.max(at).min(bytes.len())].iter().position(digit) {
                let from = at + from;
                let length = bytes[from..].iter().take_while(|byte| digit(byte)).count();
                let number = extreme(rng).to_string();
                // The length of a safetensors header is kept right, so that what it says is looked at.
                if from > 8 && bytes[8] == b'{' {
                    let stated = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                    let stated = stated.wrapping_add(number.len() as u64).wrapping_sub(length as u64);
                    bytes[..8].copy_from_slice(&stated.to_le_bytes());
                }
                bytes.splice(from..from + length, number.into_bytes());
            }
        }
        _ => {}
    }
}

/// A matrix of any format in any arrangement, with tensors that often fit.
fn view(tensor: &Tensor<'_>, rng: &mut Rng) {
    let pick = |rng: &mut Rng, from: &[usize]| *rng.choice(from).unwrap();
    let (rows, cols) = (pick(rng, &[1, 8, 16, 24]), pick(rng, &[8, 32, 64, 256]));
    let (group, block) = (pick(rng, &[8, 32, 40, cols]), [pick(rng, &[1, 3, 8]), pick(rng, &[8, 24, 32])]);
    let groups = cols.div_ceil(group);
    let (zero_points, act_order) = (rng.bool(), rng.bool());
    let int4 = WeightFormat::Int4 { group: Some(group), scale: ScaleFormat::Bf16, zero_points, act_order };
    let fp8 = WeightFormat::Fp8Block { block, scale: ScaleFormat::F32 };
    let scaled = [rows.div_ceil(block[0]), cols.div_ceil(block[1])];
    let (kind, format, tensors): (u8, WeightFormat, Vec<(Dtype, Vec<usize>)>) = match rng.u8(0..15) {
        0 => (0, WeightFormat::F32, vec![(Dtype::F32, vec![rows, cols])]),
        1 => (0, WeightFormat::F16, vec![(Dtype::F16, vec![rows, cols])]),
        2 => (0, WeightFormat::Bf16, vec![(Dtype::BF16, vec![cols, rows])]),
        3 => (1, fp8, vec![(Dtype::F8_E4M3, vec![rows, cols]), (Dtype::F32, scaled.to_vec())]),
        4 => (1, WeightFormat::Fp8Tensor, vec![(Dtype::F8_E4M3, vec![rows, cols]), (Dtype::F32, vec![1])]),
        5 => (1, WeightFormat::Fp8Channel, vec![(Dtype::F8_E4M3, vec![rows, cols]), (Dtype::F32, vec![rows])]),
        6 => (1, WeightFormat::Int8Channel, vec![(Dtype::I8, vec![rows, cols]), (Dtype::F16, vec![rows, 1])]),
        7 => (1, WeightFormat::Mxfp4, vec![(Dtype::U8, vec![rows, cols / 2]), (Dtype::U8, vec![rows, cols / 32])]),
        8 => (
            2,
            WeightFormat::Nvfp4,
            vec![
                (Dtype::U8, vec![rows, cols / 2]),
                (Dtype::F8_E4M3, vec![rows, cols.div_ceil(16)]),
                (Dtype::F32, vec![1]),
            ],
        ),
        9 => (
            3,
            int4,
            vec![
                (Dtype::I32, vec![rows, cols / 8]),
                (Dtype::BF16, vec![rows, groups]),
                (Dtype::I32, vec![rows.div_ceil(8), groups]),
                (Dtype::I32, vec![cols]),
            ],
        ),
        10 => (
            4,
            int4,
            vec![
                (Dtype::I32, vec![cols / 8, rows]),
                (Dtype::BF16, vec![groups, rows]),
                (Dtype::I32, vec![groups, rows.div_ceil(8)]),
                (Dtype::I32, vec![cols]),
            ],
        ),
        11 => (
            5,
            int4,
            vec![
                (Dtype::I32, vec![cols, rows / 8]),
                (Dtype::BF16, vec![groups, rows]),
                (Dtype::I32, vec![groups, rows / 8]),
            ],
        ),
        12 => (6, WeightFormat::Q8_0, vec![(Dtype::U8, vec![rows, cols / 32 * 34])]),
        13 => (6, WeightFormat::Q4K, vec![(Dtype::U8, vec![rows, cols / 256 * 144])]),
        _ => (6, WeightFormat::Q6K, vec![(Dtype::U8, vec![rows, cols / 256 * 210])]),
    };
    let count = pick(rng, &[0, 0, 1, 3]);
    let mask = *rng.choice(&[0, 0x3f, 0x3f, 0xff]).unwrap();
    // One that does not fit.
    let odd = rng.usize(0..2 * tensors.len());
    let mut bytes = Vec::new();
    let mut shapes = Vec::new();
    for (at, (dtype, mut shape)) in tensors.into_iter().enumerate() {
        if count > 0 {
            shape.insert(0, count);
        }
        if at == odd && !shape.is_empty() {
            let dimension = rng.usize(0..shape.len());
            shape[dimension] = extreme(rng) as usize;
        }
        let size = shape.iter().fold(dtype.bitsize() / 8, |size, part| size.wrapping_mul(*part));
        // Indices of groups are small.
        let mask = if at == 3 { 0 } else { mask };
        bytes.push((0..size.min(1 << 16)).map(|_| rng.u8(..) & mask).collect::<Vec<u8>>());
        shapes.push((dtype, shape));
    }
    let made: Vec<Tensor<'_>> = shapes
        .into_iter()
        .zip(&bytes)
        .map(|((dtype, shape), bytes)| Tensor { name: Cow::Borrowed("made"), dtype, shape, bytes })
        .collect();
    // Now and then another tensor altogether.
    let at = |at: usize| made.get(at).unwrap_or(tensor);
    let [first, second, third, fourth] = [at(0), at(1), at(2), at(3)];
    let stored = match kind {
        0 => Stored::Plain(first),
        1 => Stored::Scaled { codes: first, scales: second },
        2 => Stored::Nvfp4 { codes: first, scales: second, global: third, divides: zero_points },
        3 => Stored::PackQuantized {
            codes: first,
            scales: second,
            zeros: zero_points.then_some(third),
            g_idx: act_order.then_some(fourth),
        },
        4 => Stored::Gptq {
            codes: first,
            scales: second,
            zeros: third,
            zeros_less_one: zero_points,
            g_idx: act_order.then_some(fourth),
        },
        5 => Stored::Awq { codes: first, scales: second, zeros: third },
        _ => Stored::Gguf(if rng.u8(0..4) > 0 { first } else { tensor }),
    };
    let stack = match (count, rng.u8(0..6)) {
        (_, 0) => Some((extreme(rng) as usize, extreme(rng) as usize)),
        (0, _) => None,
        (count, _) => Some((rng.usize(0..count), count)),
    };
    let layout = *rng.choice(&[GateUpLayout::Separate, GateUpLayout::Halves, GateUpLayout::Interleaved]).unwrap();
    let (part, rows) = match (rng.u8(0..4), layout) {
        (0, _) => (Rows::Gate(layout), rows.div_ceil(2)),
        (1, _) => (Rows::Up(layout), rows.div_ceil(2)),
        (_, _) => (Rows::All, rows),
    };
    let orientation = if format == WeightFormat::Bf16 { Orientation::InOut } else { Orientation::OutIn };
    let shape = if rng.u8(0..8) > 0 { [rows, cols] } else { [extreme(rng) as usize, extreme(rng) as usize] };
    if let Ok(matrix) = Matrix::view(stored, format, orientation, part, stack, shape) {
        VIEWS.set(VIEWS.get() + 1);
        let [rows, cols] = matrix.shape();
        for row in 0..rows {
            for col in 0..cols {
                std::hint::black_box(matrix.get(row, col));
            }
        }
    }
}

thread_local! {
    /// Views that succeeded.
    static VIEWS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

fn corners(matrix: &Matrix<'_>) {
    let [rows, cols] = matrix.shape();
    for row in [0, rows / 2, rows - 1] {
        for col in [0, cols / 2, cols - 1] {
            std::hint::black_box(matrix.get(row, col));
        }
    }
}

fn look_at_router(router: &RouterWeights<'_>) {
    router.weight.iter().for_each(corners);
}

fn look(weights: &MoeWeights<'_>) {
    look_at_router(&weights.router);
    for MlpWeights { gate, up, down, .. } in weights.experts.iter().chain(&weights.shared) {
        gate.iter().chain([up, down]).for_each(corners);
    }
    weights.shared_gate.iter().for_each(corners);
}

/// All that a caller can do with a checkpoint; how far it came.
fn use_all(whole: &Whole, config: &str, file: Vec<u8>, rng: &mut Rng) -> usize {
    let checkpoint = match whole.open(config, file) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            drop(error.to_string());
            return 0;
        }
    };
    let names: Vec<&str> = checkpoint.names().collect();
    if !names.is_empty() {
        for _ in 0..4 {
            let tensor = checkpoint.tensor(names[rng.usize(0..names.len())]).unwrap();
            let len = tensor.shape.iter().product();
            drop((tensor.to_f32(len), tensor.to_i32(len), checkpoint.gguf_format(&tensor.name)));
        }
        let name = names[rng.usize(0..names.len())];
        (0..4).for_each(|_| view(&checkpoint.tensor(name).unwrap(), rng));
    }
    drop((format!("{checkpoint:?}"), checkpoint.bytes()));
    let mut reached = 1;
    for layer in [None, Some(rng.usize(0..4))] {
        let request = Request { layer, ..ANY };
        match resolve(&checkpoint, &request) {
            Ok(resolved) => {
                reached = 2;
                look(&resolved.weights(&checkpoint).unwrap());
            }
            Err(error) => drop(error.to_string()),
        }
        match resolve_router(&checkpoint, &request) {
            Ok(resolved) => look_at_router(&resolved.router_weights(&checkpoint).unwrap()),
            Err(error) => drop(error.to_string()),
        }
    }
    reached
}

/// How far a case came, the memory it took, and what it found wrong.
fn run([small, large]: &[Vec<Whole>; 2], index: u64) -> (usize, usize, Option<String>) {
    let mut rng = Rng::with_seed(index);
    let of = if rng.u8(0..40) > 0 { small } else { large };
    let whole = &of[rng.usize(0..of.len())];
    let (mut value, mut file) = (whole.config.clone(), whole.file.clone());
    let what = rng.u8(0..5);
    let times = *rng.choice(&[1, 1, 1, 2, 3]).unwrap();
    if what < 2 {
        (0..times).for_each(|_| mutate_value(&mut value, &mut rng));
    }
    let mut config = value.to_string();
    if what == 2 {
        let mut bytes = config.into_bytes();
        let header = bytes.len();
        (0..times).for_each(|_| mutate_bytes(&mut bytes, header, &mut rng));
        config = String::from_utf8_lossy(&bytes).into_owned();
    }
    if what > 2 {
        (0..times).for_each(|_| mutate_bytes(&mut file, whole.header, &mut rng));
    }
    let limit = (64 << 20) + 2 * (file.len() + config.len());
    let (result, most) = peak(|| catch_unwind(AssertUnwindSafe(|| use_all(whole, &config, file, &mut rng))));
    let wrong = match &result {
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Some(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
        }
        Ok(_) if most > limit => Some(format!("{most} bytes of memory")),
        Ok(_) => None,
    };
    let wrong = wrong.map(|wrong| format!("mutation {index} of {} ({}): {wrong}", whole.name, whole.shard));
    (result.unwrap_or(0), most, wrong)
}

#[test]
fn damaged_checkpoints_give_typed_errors_in_bounded_memory() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let wholes = wholes();
    if let Some(index) = number("MOEWE_MUTATION") {
        let (reached, most, wrong) = run(&wholes, index);
        assert!(wrong.is_none(), "{reached} {most} {wrong:?}");
        return;
    }
    let (wanted, bounded) = number("MOEWE_MUTATIONS").map_or((USUAL, true), |count| (count, false));
    let start = Instant::now();
    let (mut reached, mut most, mut wrong) = ([0_u64; 3], 0, vec![]);
    for index in 0..wanted {
        let (far, held, fault) = run(&wholes, index);
        reached[far] += 1;
        most = most.max(held);
        wrong.extend(fault);
        if wrong.len() >= 20 || (bounded && start.elapsed() > LONGEST) {
            break;
        }
    }
    let [refused, opened, resolved] = reached;
    let ran = refused + opened + resolved;
    let (time, views) = (start.elapsed(), VIEWS.get());
    println!("{ran} mutations in {time:?}: {refused} refused at once, {resolved} resolved, {views} views");
    println!("most memory: {most} bytes");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(ran >= wanted.min(LEAST), "only {ran} mutations in {LONGEST:?}");
    // Damage that never gets past the header would test nothing else.
    assert!(opened > ran / 10 && resolved > ran / 20 && views > ran / 20, "{reached:?} {views}");
}
