//! What a device has of a whole layer's weights.

use super::{LoraWeights, MlpWeights, MoeWeights, RouterWeights};
use crate::error::{Error, Result};
use crate::spec::MoeSpec;

impl<'a> MlpWeights<'a> {
    /// Columns `first .. first + size` of the inner width.
    fn part(&self, (first, size): (usize, usize), owns_down_bias: bool) -> Result<Self> {
        let Self { gate, up, down, gate_bias, up_bias, down_bias, input_scales } = self;
        let inner = first..first + size;
        let [width, _] = down.shape();
        let rows = |matrix: &super::Matrix<'a>| matrix.part(inner.clone(), 0..matrix.shape()[1]);
        let bias =
            |bias: &Option<Vec<f32>>| bias.as_ref().and_then(|bias| bias.get(inner.clone())).map(<[f32]>::to_vec);
        Ok(Self {
            gate: gate.as_ref().map(rows).transpose()?,
            up: rows(up)?,
            down: down.part(0..width, inner.clone())?,
            gate_bias: bias(gate_bias),
            up_bias: bias(up_bias),
            down_bias: down_bias.clone().filter(|_| owns_down_bias),
            input_scales: *input_scales,
        })
    }
}

impl<'a> LoraWeights<'a> {
    fn part(&self, (first, size): (usize, usize)) -> Result<Self> {
        let Self { gate_up_a, gate_b, up_b, down_a, down_b } = self;
        let inner = first..first + size;
        let rows = |matrix: &super::Matrix<'a>| matrix.part(inner.clone(), 0..matrix.shape()[1]);
        Ok(Self {
            gate_up_a: gate_up_a.clone(),
            gate_b: gate_b.as_ref().map(rows).transpose()?,
            up_b: rows(up_b)?,
            down_a: down_a.part(0..down_a.shape()[0], inner.clone())?,
            down_b: down_b.clone(),
        })
    }
}

impl<'a> MoeWeights<'a> {
    /// The weights of a device that holds what `spec` says of the layer whose weights these are: its experts, its
    /// columns, and what is common if that is its own. Copies no matrix.
    ///
    /// # Errors
    /// An invalid spec, or weights that are not of such a layer.
    pub fn part(&self, spec: &MoeSpec) -> Result<Self> {
        spec.validate()?;
        let Self { router, experts, lora, shared, shared_gate, latent, output_bias, output_norm } = self;
        let columns = spec.shard.columns(spec.experts.intermediate_size);
        let owns_down_bias = spec.shard.owns_down_bias();
        let of = |count: usize, id: Option<usize>| {
            id.filter(|id| *id < count).ok_or_else(|| {
                Error::invalid(
                    "experts",
                    format!("weights of {count}"),
                    format!("of {}", spec.num_experts),
                    "give the weights of the whole layer",
                )
            })
        };
        let here = spec.placement.experts(spec.num_experts);
        let adapter = |experts: &Vec<LoraWeights<'a>>| -> Result<Vec<LoraWeights<'a>>> {
            here.iter().map(|id| experts[of(experts.len(), *id)?].part(columns)).collect()
        };
        let common = spec.adds_common_terms();
        let part = Self {
            router: if spec.entry.is_batched() { RouterWeights::NONE } else { router.clone() },
            experts: here
                .iter()
                .map(|id| experts[of(experts.len(), *id)?].part(columns, owns_down_bias))
                .collect::<Result<_>>()?,
            lora: lora.iter().filter(|_| spec.lora.is_some()).map(adapter).collect::<Result<_>>()?,
            shared: shared.iter().filter(|_| common && spec.shared.is_some()).cloned().collect(),
            shared_gate: shared_gate.clone().filter(|_| common && spec.shared.is_some()),
            latent: latent.clone().filter(|_| spec.latent.is_some()),
            output_bias: output_bias.clone().filter(|_| common && spec.output_bias),
            output_norm: output_norm.clone().filter(|_| spec.output_norm.is_some()),
        };
        part.check(spec)?;
        Ok(part)
    }
}
