//! Synthetic weights: what a device makes where it lies is, word for word, what a checkpoint of such weights packs to.

use moewe::conformance::synthetic::{self, Expert};
use moewe::host::Host;
use moewe::kernels::pack::{GroupSource, PackedMatrix};
use moewe::kernels::{Operation, Stream};
use moewe::plan::{Backend, BufferSlice, Launch};
use moewe::schedule::lower;
use moewe::spec::*;
use moewe::{Cpu, MlpWeights, Options, Scope};

use crate::rig::{AUTO, deepseek_like, gpu};

/// A layer that has weights of routed experts only.
fn layer(format: WeightFormat, [hidden_size, intermediate_size]: [usize; 2], biases: bool) -> MoeSpec {
    let mut spec = deepseek_like();
    (spec.hidden_size, spec.experts.intermediate_size) = (hidden_size, intermediate_size);
    (spec.num_experts, spec.top_k) = (3, 2);
    spec.routing.method = RoutingMethod::TopKThenScore { score: ChosenScore::Softmax };
    spec.router = Router::Given { transform: LogitTransform::None };
    spec.shared = None;
    spec.experts.format = format;
    (spec.experts.gate_up_bias, spec.experts.down_bias) = (biases, biases);
    spec
}

fn layers() -> Vec<MoeSpec> {
    let fp8 = |block, scale| WeightFormat::Fp8Block { block, scale };
    let mut layers = vec![];
    for (format, shape) in [
        (WeightFormat::Bf16, [136, 96]),
        // A word whose second half lies behind the row.
        (WeightFormat::Bf16, [67, 35]),
        (WeightFormat::F32, [33, 20]),
        (WeightFormat::F16, [40, 30]),
        (fp8([128, 128], ScaleFormat::F32), [384, 256]),
        // Blocks at the edge are smaller.
        (fp8([128, 128], ScaleFormat::F32), [200, 144]),
        (fp8([8, 16], ScaleFormat::Bf16), [72, 50]),
        (fp8([1, 32], ScaleFormat::E8m0), [96, 160]),
        (WeightFormat::Mxfp4, [160, 96]),
        (WeightFormat::Mxfp4, [72, 40]),
    ] {
        layers.extend([false, true].map(|biases| layer(format, shape, biases)));
    }
    layers[0].experts.activation = Activation::Relu2;
    layers
}

fn packed(matrix: &PackedMatrix, segment: usize, experts: &[MlpWeights<'_>]) -> Vec<u32> {
    let mut memory = vec![0; matrix.segments[segment].words];
    let source = |group: usize| {
        let MlpWeights { gate, up, down, gate_bias, up_bias, down_bias, .. } = &experts[group];
        let biases = |all: [&Option<Vec<f32>>; 2]| all.into_iter().flatten().cloned().collect::<Vec<_>>();
        let (matrices, biases) = match matrix.name {
            "experts.gate_up" => (gate.iter().chain([up]).collect(), biases([gate_bias, up_bias])),
            _ => (vec![down], biases([down_bias, &None])),
        };
        // The test's few biases may live as long as it does.
        Ok(GroupSource { matrices, biases: biases.into_iter().map(|bias| &*bias.leak()).collect() })
    };
    let write = &mut |first: usize, words: &[u32]| {
        memory[first..first + words.len()].copy_from_slice(words);
        Ok(())
    };
    matrix.pack(segment, &source, write).unwrap();
    memory
}

fn made<B: Host>(host: &B, matrix: &PackedMatrix, segment: usize) -> Vec<u32> {
    let spans = host.upload("spans", &matrix.span_table(segment)).unwrap();
    // What the kernel leaves out would show; what it pads with is 0.
    let target = host.upload("segment", &vec![u32::MAX; matrix.segments[segment].words]).unwrap();
    synthetic::fill(host, matrix, &spans, &target).unwrap();
    host.read(&target).unwrap()
}

#[test]
fn synthetic_segments_are_what_a_checkpoint_of_such_weights_packs_to() {
    for spec in layers() {
        let experts: Vec<Expert> = (0..spec.num_experts).map(|id| Expert::new(&spec, id).unwrap()).collect();
        let experts: Vec<MlpWeights<'_>> = experts.iter().map(|expert| expert.view().unwrap()).collect();
        for segment_bytes in [4 << 10, 50_000, 128 << 20] {
            let options = Options { segment_bytes: Some(segment_bytes), ..AUTO };
            let schedule = lower(&spec, Scope::Layer, 1, &gpu().facts(), &options).unwrap();
            for matrix in &schedule.matrices {
                for segment in 0..matrix.segments.len() {
                    let what = format!("{} of {:?}, segment {segment}", matrix.name, spec.experts.format);
                    let want = packed(matrix, segment, &experts);
                    assert!(made(&Cpu::new(), matrix, segment) == want, "{what}: the twin differs from pack");
                    assert!(made(gpu(), matrix, segment) == want, "{what}: the device differs from pack");
                }
            }
        }
    }
}

#[test]
fn synthetic_weights_keep_the_size_of_what_they_multiply() {
    for spec in layers() {
        let experts: Vec<Expert> = (0..spec.num_experts).map(|id| Expert::new(&spec, id).unwrap()).collect();
        for matrix in experts.iter().map(|expert| expert.view().unwrap().down) {
            let [rows, cols] = matrix.shape();
            let squares: f64 = (0..rows * cols).map(|at| f64::from(matrix.get(at / cols, at % cols)).powi(2)).sum();
            let gain = squares / rows as f64;
            assert!((0.3..3.0).contains(&gain), "{:?}: {gain}", spec.experts.format);
        }
    }
}

#[test]
fn tensors_groups_and_rows_have_weights_of_their_own() {
    let spec = layer(WeightFormat::Bf16, [64, 64], false);
    let experts: Vec<Expert> = (0..2).map(|id| Expert::new(&spec, id).unwrap()).collect();
    let mut rows = vec![];
    for expert in &experts {
        let MlpWeights { gate, up, down, .. } = expert.view().unwrap();
        for matrix in [gate.unwrap(), up, down] {
            rows.extend((0..64).map(|row| (0..64).map(|col| matrix.get(row, col).to_bits()).collect::<Vec<_>>()));
        }
    }
    rows.sort();
    rows.dedup();
    assert_eq!(rows.len(), 2 * 3 * 64);
}

#[test]
fn weights_that_are_not_made_are_refused_by_name() {
    let mut spec = layer(WeightFormat::Nvfp4, [64, 64], false);
    let refused = |spec: &MoeSpec| synthetic::plan(Cpu::new(), spec, 1, &AUTO).err().unwrap().to_string();
    assert!(refused(&spec).contains("row_scale: true"), "{}", refused(&spec));
    spec.experts.format = WeightFormat::Q4K;
    spec.hidden_size = 256;
    spec.experts.intermediate_size = 256;
    assert!(refused(&spec).contains("Q4K"), "{}", refused(&spec));
    spec.experts.format = WeightFormat::Bf16;
    spec.router = deepseek_like().router;
    assert!(refused(&spec).contains("router_gemm"), "{}", refused(&spec));
}

#[test]
fn the_streaming_kernel_reads_every_word_once() {
    fn sum<B: Host>(host: &B, words: &[u32]) -> u32 {
        let source = host.upload("source", words).unwrap();
        let sums = host.create_buffer("sums", 4 * 2 * Stream::WORKGROUP as u64, false).unwrap();
        let kernel = host.compile("stream", &Operation::Stream(Stream)).unwrap();
        let slice = |buffer| BufferSlice { buffer, offset: 0, bytes: host.buffer_bytes(buffer) };
        let binding = host.bind(&kernel, &[slice(&source), slice(&sums)]).unwrap();
        let mut encoder = host.encoder();
        let launch = Launch { kernel: &kernel, binding: &binding, workgroups: [2, 1, 1], params: 0 };
        host.launch(&mut encoder, &mut std::iter::once(launch)).unwrap();
        host.submit(encoder).unwrap();
        host.read(&sums).unwrap().into_iter().fold(0, |sum, word| sum ^ word)
    }
    for vecs in [1, 511, 512, 2048, 10_007] {
        let words: Vec<u32> = (0..4 * vecs).map(|word: u32| word.wrapping_mul(0x9e37_79b9) ^ 0x1234_5678).collect();
        let want = words.iter().fold(0, |sum, word| sum ^ word);
        assert_eq!([sum(&Cpu::new(), &words), sum(gpu(), &words)], [want; 2], "{vecs} vectors");
    }
}
