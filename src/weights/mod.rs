//! Borrowed weights of one layer, checked against its spec. Changes no value.

mod check;
mod distribution;
mod matrix;
mod parts;
mod tensor;

use rayon::prelude::*;
pub use safetensors::Dtype;

pub use matrix::{Matrix, Rows, Stored};
pub(crate) use parts::GgufBlock;
pub use parts::{Blocks, Code, PackedScale, Parts};
pub use tensor::Tensor;

/// Weights of the router.
#[derive(Debug, Clone)]
pub struct RouterWeights<'a> {
    /// [outputs, H]; `None` if the caller gives the logits.
    pub weight: Option<Matrix<'a>>,
    /// Bias inside the logits, `[outputs]`.
    pub bias: Option<Vec<f32>>,
    /// `e_score_correction_bias`, one for each selectable output: for selection only, f32 whatever the
    /// checkpoint holds.
    pub selection_bias: Option<Vec<f32>>,
    /// Expert ids of each token id, [vocab_size, top_k].
    pub tid2eid: Option<Vec<i32>>,
    /// `[H]`, what the router multiplies its normed input with ([`RouterInput::RmsNormScaled`](crate::spec::RouterInput::RmsNormScaled)).
    pub input_scale: Option<Vec<f32>>,
    /// `[E]`, factors on the routing weights.
    pub per_expert_scale: Option<Vec<f32>>,
    /// Factor on all weights of [`RoutingMethod::JointNorm`](crate::spec::RoutingMethod::JointNorm).
    pub global_scale: Option<f32>,
    /// The layers of [`Router::Mlp`](crate::spec::Router::Mlp).
    pub mlp: Option<RouterMlpWeights<'a>>,
}

/// Weights of a [`Router::Mlp`](crate::spec::Router::Mlp). S is its state's width.
#[derive(Debug, Clone)]
pub struct RouterMlpWeights<'a> {
    /// W_d [S, H].
    pub down: Matrix<'a>,
    /// b_d `[S]`.
    pub down_bias: Vec<f32>,
    /// `[S]`, on the state of the previous layer, if one enters.
    pub states_scale: Option<Vec<f32>>,
    /// `[S]`, behind the norm.
    pub norm: Vec<f32>,
    /// W_1 [S, S].
    pub fc1: Matrix<'a>,
    /// b_1 `[S]`.
    pub fc1_bias: Vec<f32>,
    /// W_2 [S, S].
    pub fc2: Matrix<'a>,
    /// b_2 `[S]`.
    pub fc2_bias: Vec<f32>,
    /// W_o [outputs, S].
    pub out: Matrix<'a>,
}

impl RouterWeights<'_> {
    /// A router without any weights: that of [`Router::Given`](crate::spec::Router::Given), and where to begin with the others.
    pub const NONE: Self = Self {
        weight: None,
        bias: None,
        selection_bias: None,
        tid2eid: None,
        input_scale: None,
        per_expert_scale: None,
        global_scale: None,
        mlp: None,
    };
}

/// Weights of one MLP.
#[derive(Debug, Clone)]
pub struct MlpWeights<'a> {
    /// [I, H]; `None` for an activation without gate.
    pub gate: Option<Matrix<'a>>,
    /// [I, H].
    pub up: Matrix<'a>,
    /// [H, I].
    pub down: Matrix<'a>,
    /// `[I]`.
    pub gate_bias: Option<Vec<f32>>,
    /// `[I]`.
    pub up_bias: Option<Vec<f32>>,
    /// `[H]`.
    pub down_bias: Option<Vec<f32>>,
    /// Of [`ActivationQuant::Static`](crate::spec::ActivationQuant::Static).
    pub input_scales: Option<InputScales>,
}

/// What the rows that enter an expert's GEMMs are divided by, for their codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InputScales {
    /// Of gate and up, which read the same codes.
    pub gate_up: f32,
    /// Of down.
    pub down: f32,
}

/// One adapter on one expert; r is [`Lora::rank`](crate::spec::Lora), L the width at which routed experts work.
#[derive(Debug, Clone)]
pub struct LoraWeights<'a> {
    /// A13 [r, L].
    pub gate_up_a: Matrix<'a>,
    /// B of the gate [I, r]; `None` for an activation without gate.
    pub gate_b: Option<Matrix<'a>>,
    /// B of up [I, r].
    pub up_b: Matrix<'a>,
    /// A2 [r, I].
    pub down_a: Matrix<'a>,
    /// B2 [L, r].
    pub down_b: Matrix<'a>,
}

/// Weights of one layer. Where a device has a part of it, those that it has:
/// [`MoeWeights::part`] takes them from the whole.
#[derive(Debug, Clone)]
pub struct MoeWeights<'a> {
    /// The router's.
    pub router: RouterWeights<'a>,
    /// One entry a slot ([`Placement`](crate::spec::Placement)): by id where all experts are here. Empty where only
    /// the routing is planned.
    pub experts: Vec<MlpWeights<'a>>,
    /// Of each adapter, one entry a slot.
    pub lora: Vec<Vec<LoraWeights<'a>>>,
    /// The shared experts': [`MoeSpec::shared_mlps`](crate::spec::MoeSpec::shared_mlps) of them.
    pub shared: Vec<MlpWeights<'a>>,
    /// [1, H], if the shared expert has a sigmoid gate.
    pub shared_gate: Option<Matrix<'a>>,
    /// Around the routed experts.
    pub latent: Option<LatentWeights<'a>>,
    /// `[H]`, on the routed sum.
    pub output_bias: Option<Vec<f32>>,
    /// `[H]`, behind the norm of the output.
    pub output_norm: Option<Vec<f32>>,
}

/// Weights of a [`Latent`](crate::spec::Latent). L is its size.
#[derive(Debug, Clone)]
pub struct LatentWeights<'a> {
    /// [L, H].
    pub down: Matrix<'a>,
    /// [H, L].
    pub up: Matrix<'a>,
    /// `[L]`: what a norm multiplies with, 1 included where the model stores it less 1.
    pub norm: LatentNormWeights,
}

/// Weights of a [`LatentNorm`](crate::spec::LatentNorm).
#[derive(Debug, Clone, PartialEq)]
pub enum LatentNormWeights {
    /// Of [`LatentNorm::None`](crate::spec::LatentNorm::None).
    None,
    /// Of [`LatentNorm::Reduced`](crate::spec::LatentNorm::Reduced).
    Reduced(Vec<f32>),
    /// Of [`LatentNorm::PreAndPost`](crate::spec::LatentNorm::PreAndPost).
    PreAndPost {
        /// Behind the first norm.
        pre: Vec<f32>,
        /// Before the second norm.
        post: Vec<f32>,
    },
}

/// Weights of one matrix that are NaN or infinite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Name of the tensor in the checkpoint.
    pub tensor: String,
    /// The matrix that reads it, e.g. `experts[3].up`.
    pub matrix: String,
    /// How many.
    pub count: usize,
    /// Row and column of the first, in the matrix.
    pub first: [usize; 2],
}

impl MoeWeights<'_> {
    /// Every matrix with the path of its field.
    pub fn matrices(&self) -> Vec<(String, &Matrix<'_>)> {
        let Self { router, experts, lora, shared, shared_gate, latent, output_bias: _, output_norm: _ } = self;
        let mut all: Vec<(String, &Matrix<'_>)> = vec![];
        all.extend(router.weight.iter().map(|weight| ("router.weight".into(), weight)));
        if let Some(RouterMlpWeights {
            down,
            fc1,
            fc2,
            out,
            down_bias: _,
            states_scale: _,
            norm: _,
            fc1_bias: _,
            fc2_bias: _,
        }) = &router.mlp
        {
            let named = [("down", down), ("fc1", fc1), ("fc2", fc2), ("out", out)];
            all.extend(named.map(|(name, matrix)| (format!("router.mlp.{name}"), matrix)));
        }
        for (path, mlps) in [("experts", experts), ("shared", shared)] {
            for (index, MlpWeights { gate, up, down, gate_bias: _, up_bias: _, down_bias: _, input_scales: _ }) in
                mlps.iter().enumerate()
            {
                all.extend(gate.iter().map(|gate| (format!("{path}[{index}].gate"), gate)));
                all.push((format!("{path}[{index}].up"), up));
                all.push((format!("{path}[{index}].down"), down));
            }
        }
        for (adapter, experts) in lora.iter().enumerate() {
            for (index, LoraWeights { gate_up_a, gate_b, up_b, down_a, down_b }) in experts.iter().enumerate() {
                let named = [("gate_up_a", gate_up_a), ("up_b", up_b), ("down_a", down_a), ("down_b", down_b)];
                let named = named.into_iter().chain(gate_b.iter().map(|gate_b| ("gate_b", gate_b)));
                all.extend(named.map(|(name, matrix)| (format!("lora[{adapter}][{index}].{name}"), matrix)));
            }
        }
        all.extend(shared_gate.iter().map(|gate| ("shared.gate".into(), gate)));
        if let Some(LatentWeights { down, up, norm: _ }) = latent {
            all.extend([("latent.down".into(), down), ("latent.up".into(), up)]);
        }
        all
    }

    /// Finds weights that are NaN or infinite: each matrix that has some. They are no error elsewhere, since
    /// they propagate as the arithmetic says; biases and scales are checked by [`MoeWeights::check`].
    pub fn scan(&self) -> Vec<Damage> {
        let damage = |(path, matrix): &(String, &Matrix<'_>)| {
            let [rows, cols] = matrix.shape();
            let bad = |(row, col): &(usize, usize)| !matrix.get(*row, *col).is_finite();
            let mut found = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col))).filter(bad);
            let (row, col) = found.next()?;
            let tensor = matrix.name().to_owned();
            Some(Damage { tensor, matrix: path.clone(), count: 1 + found.count(), first: [row, col] })
        };
        self.matrices().par_iter().filter_map(damage).collect()
    }
}
