//! The device that MOEWE_ADAPTER names, and the library's random layers on it: what fails here is the test's
//! fault, so it panics.

use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

use fastrand::Rng;
use moewe::conformance::sample;
use moewe::host::{self, Adapter, Limits, Session};
use moewe::reference::{self, Inputs};
use moewe::schedule::{DeviceFacts, Units};
use moewe::spec::{
    ActivationCode, ActivationQuant, ActivationRounding, ActivationScale, BlockScale, CombineRounding, FloatType,
    MoeSpec, Precision, RoutingMethod, ScaleFormat, ScaleRule, ScaleSpan, Score, SelectionKey, WeightFormat,
};
use moewe::{Cpu, Cut, Cuts, Matrix, MoeWeights, Options, Plan, Wgpu};

#[allow(unused_imports, reason = "the benches use less of it")]
pub use moewe::conformance::sample::{LayerInputs, deepseek_like, fits};

/// The backend under test.
#[cfg(not(feature = "suite-on-cuda"))]
pub type Gpu = Wgpu;
/// The backend under test.
#[cfg(feature = "suite-on-cuda")]
pub type Gpu = moewe::Cuda;

/// The device under test.
#[cfg(not(feature = "suite-on-cuda"))]
pub fn gpu() -> &'static Gpu {
    wgpu()
}

/// The first CUDA device. None is a failure.
#[cfg(feature = "suite-on-cuda")]
pub fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| moewe::Cuda::open(0).unwrap())
}

/// It without the kernels that it has compiled.
#[allow(dead_code, reason = "the benches use less of it")]
pub fn fresh_gpu() -> Gpu {
    #[cfg(not(feature = "suite-on-cuda"))]
    return Wgpu::new(gpu().device().clone(), gpu().queue().clone());
    #[cfg(feature = "suite-on-cuda")]
    gpu().with_compiler(gpu().compiler().clone())
}

/// The adapter under test. None is a failure.
pub fn adapter() -> &'static Adapter {
    static ADAPTER: OnceLock<Adapter> = OnceLock::new();
    ADAPTER.get_or_init(|| {
        let wanted = std::env::var("MOEWE_ADAPTER").unwrap_or_default();
        let mut adapters = host::adapters();
        let names: Vec<_> = adapters.iter().map(|adapter| adapter.name.clone()).collect();
        let at = adapters.iter().position(|adapter| adapter.matches(&wanted));
        let adapter =
            adapters.swap_remove(at.unwrap_or_else(|| panic!("no adapter matches {wanted:?}; there are {names:?}")));
        println!("adapter: {}", adapter.name);
        adapter
    })
}

/// The adapter under test, under the portability floor.
pub fn wgpu() -> &'static Wgpu {
    static GPU: OnceLock<Wgpu> = OnceLock::new();
    GPU.get_or_init(|| host::open(adapter(), limits()).unwrap())
}

/// WebGPU's default limits and no features, which is what the tests are about; MOEWE_LIMITS=adapter, for
/// benches, takes the adapter's own and its timestamps.
fn limits() -> Limits {
    match std::env::var("MOEWE_LIMITS").as_deref() {
        Ok("adapter") => Limits::Adapter,
        Ok(_) | Err(_) => Limits::Default,
    }
}

/// A matrix in its checkpoint form.
pub struct OwnedMatrix(sample::OwnedMatrix);

impl OwnedMatrix {
    pub fn random(rng: &mut Rng, format: WeightFormat, shape: [usize; 2]) -> Self {
        Self(sample::OwnedMatrix::random(rng, format, shape).unwrap())
    }

    pub fn view(&self) -> Matrix<'_> {
        self.0.view().unwrap()
    }
}

/// A layer with random weights.
pub struct RandomLayer(sample::RandomLayer);

impl Deref for RandomLayer {
    type Target = sample::RandomLayer;

    fn deref(&self) -> &sample::RandomLayer {
        &self.0
    }
}

impl DerefMut for RandomLayer {
    fn deref_mut(&mut self) -> &mut sample::RandomLayer {
        &mut self.0
    }
}

impl RandomLayer {
    pub fn new(spec: MoeSpec, seed: u64) -> Self {
        Self(sample::RandomLayer::new(spec, seed).unwrap())
    }

    pub fn weights(&self) -> MoeWeights<'_> {
        self.0.weights().unwrap()
    }

    /// Writes NaN into one weight of an expert's up matrix, which has to be F32.
    pub fn spoil(&mut self, expert: usize) {
        assert!(self.0.spoil(expert));
    }

    /// Hidden states, and token ids where the layer reads them.
    pub fn inputs(&self, tokens: usize, seed: u64) -> (Vec<f32>, Option<Vec<u32>>) {
        let LayerInputs { hidden_states, token_ids, .. } = self.all_inputs(tokens, seed);
        (hidden_states, token_ids)
    }

    /// All that the layer reads. Logits that are given have ties, NaN and infinities.
    pub fn all_inputs(&self, tokens: usize, seed: u64) -> LayerInputs {
        self.0.inputs(tokens, seed)
    }

    pub fn reference(&self, hidden_states: &[f32], token_ids: Option<&[u32]>) -> reference::Layer {
        self.judge(Inputs { token_ids, ..Inputs::of(hidden_states) })
    }

    pub fn judge(&self, inputs: Inputs<'_>) -> reference::Layer {
        self.0.judge(inputs).unwrap()
    }

    pub fn on_gpu(&self, max_tokens: usize, options: &Options) -> Session<Gpu> {
        let plan = Plan::new(gpu().clone(), &self.spec, &self.weights(), max_tokens, &segmented(options)).unwrap();
        Session::new(plan, &self.spec).unwrap()
    }

    pub fn on_cpu(&self, max_tokens: usize, options: &Options, facts: Option<DeviceFacts>) -> Session<Cpu> {
        let cpu = facts.map_or_else(Cpu::new, Cpu::like);
        let plan = Plan::new(cpu, &self.spec, &self.weights(), max_tokens, &segmented(options)).unwrap();
        Session::new(plan, &self.spec).unwrap()
    }
}

/// A device of CUDA with these units, for schedules and twins.
pub fn with_units(matrix_units: Units) -> DeviceFacts {
    DeviceFacts {
        backend: "units",
        max_binding_bytes: (1 << 31) - 4,
        max_workgroups: 65_535,
        exact_halves: true,
        matrix_units,
    }
}

/// Layers that matrix units of every kind can compute, with the roundings of engines that use them.
pub fn for_matrix_units() -> Vec<MoeSpec> {
    let fp8 = WeightFormat::Fp8Block { block: [128, 128], scale: ScaleFormat::F32 };
    let quant = ActivationQuant::dynamic_fp8(128, ActivationScale::F32);
    let by_token = ActivationQuant::Dynamic {
        code: ActivationCode::E4m3,
        span: ScaleSpan::Token,
        rule: ScaleRule::FlooredAmax,
        scale: ActivationScale::F32,
    };
    let with = |format: WeightFormat, activation_quant| {
        let mut spec = deepseek_like();
        // Blocks, tiles and steps that end inside them.
        (spec.hidden_size, spec.num_experts, spec.top_k) = (288, 4, 2);
        spec.routing.method =
            RoutingMethod::TopK { score: Score::Sigmoid, key: SelectionKey::ScorePlusBias, groups: None };
        let shared = spec.shared.as_mut().map(|shared| &mut shared.mlp);
        for mlp in [&mut spec.experts].into_iter().chain(shared) {
            (mlp.intermediate_size, mlp.format, mlp.activation_quant) = (160, format, activation_quant);
            (mlp.gate_up_bias, mlp.down_bias) = (true, true);
        }
        spec.precision = Precision::float32(FloatType::Bf16, FloatType::Bf16);
        spec.precision.model = FloatType::Bf16;
        spec.precision.activation = ActivationRounding::Fused;
        spec.precision.combine = CombineRounding::WeightedRows;
        spec.precision.block_scale = BlockScale::Promoted;
        spec
    };
    vec![
        with(WeightFormat::Bf16, ActivationQuant::None),
        with(WeightFormat::Mxfp4, ActivationQuant::None),
        with(fp8, quant),
        with(WeightFormat::Fp8Channel, by_token),
    ]
}

/// The library's own choice of kernels.
pub const AUTO: Options = Options::AUTO;
/// The matrix-vector kernels for any number of tokens.
pub const GEMV: Options = only(Cut::Gemv);
/// The kernels of two rows a tile.
pub const PAIRS: Options = only(Cut::Pairs);
/// The kernels of four rows a tile.
pub const QUADS: Options = only(Cut::Quads);
/// The kernels of eight rows a tile.
pub const OCTETS: Options = only(Cut::Octets);
/// The tiled kernels for any number of tokens.
pub const TILED: Options = only(Cut::Tiles);
/// Those of codes that fill their tiles, on matrix units of warpgroups; else the same.
pub const FULL_TILES: Options = only(Cut::FullTiles);
/// Each way to cut a GEMM in WGSL.
pub const CUTS: [Options; 5] = [GEMV, PAIRS, QUADS, OCTETS, TILED];
/// And on matrix units.
pub const UNIT_CUTS: [Options; 6] = [GEMV, PAIRS, QUADS, OCTETS, TILED, FULL_TILES];

const fn only(cut: Cut) -> Options {
    Options { cuts: Cuts::only(cut), ..Options::AUTO }
}

/// `options` in segments of MOEWE_SEGMENT_BYTES, where that is set and the test does not choose.
pub fn segmented(options: &Options) -> Options {
    let wanted = std::env::var("MOEWE_SEGMENT_BYTES").ok().map(|bytes| bytes.parse().unwrap());
    Options { segment_bytes: options.segment_bytes.or(wanted), ..*options }
}
