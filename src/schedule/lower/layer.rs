//! Ids and weights to the output.

use super::*;

impl Lowering<'_> {
    /// Ids and weights to the output.
    pub(super) fn layer(&mut self, hidden_states: Rows, routed: &RoutedBuffers) -> Result<()> {
        let part = Part::Experts;
        let MoeSpec {
            hidden_size,
            num_experts,
            top_k,
            router: _,
            routing,
            experts,
            shared,
            latent,
            lora: _,
            expert_input,
            output_bias,
            output_norm,
            placement: _,
            shard: _,
            entry: _,
            precision,
        } = self.spec;
        let (hidden_size, num_experts, top_k) = (*hidden_size, *num_experts, *top_k);
        let Precision {
            input,
            output,
            model,
            router_gemm: _,
            routing_weights: _,
            weighted_input,
            gate_up: _,
            activation: _,
            combine,
            combine_order,
            block_scale: _,
        } = *precision;
        let width = self.spec.expert_width();
        let RoutedBuffers { topk_ids, topk_weights, shared_weights } = *routed;
        let f32_rows = |buffer| Rows::floats(buffer, FloatType::F32);
        let x = match expert_input {
            ExpertInput::Hidden => hidden_states,
            ExpertInput::Separate => {
                let bytes = hidden_size * input.bytes();
                let buffer = self.token_buffer("expert_hidden_states", Contents::ExpertHiddenStates, bytes);
                Rows::floats(buffer, input)
            }
        };
        let expert_slots = self.table("expert_slots", Table::ExpertSlots, num_experts);
        let rows = self.schedule.chunk_tokens * top_k;
        let sorted_rows = self.scratch("sorted_rows", top_k);
        let permute = Permute { num_experts, top_k };
        let tiles = self.buffer("tiles", Contents::Scratch, (1 + permute.max_tiles(rows)) * 16);
        let grid = Grid { x: Extent::Fixed(num_experts), y: Extent::Fixed(1) };
        let buffers = [("topk_ids", topk_ids), ("sorted_rows", sorted_rows), ("tiles", tiles)];
        let step = self.step("permute", part, Operation::Permute(permute), grid, &buffers)?;
        self.drafts.push(Draft::Permute(step));

        // What the routed experts read.
        let norm_of = |rows_per_token, eps, scale| Norm {
            rows_per_token,
            cols: width,
            input: FloatType::F32,
            eps,
            scale,
            factor: 1.0,
        };
        let mut entering = x;
        if let Some(Latent { size, format, norm }) = latent {
            let out = self.scratch("latent", *size);
            let shape = [*size, hidden_size];
            self.project("latent.down", part, x, shape, *format, false, Epilogue::Sums, out, vec![])?;
            entering = f32_rows(out);
            match norm {
                LatentNorm::None | LatentNorm::Reduced { eps: _ } => {}
                LatentNorm::PreAndPost { pre_eps, post_eps: _ } => {
                    let weight = self.table("latent_pre_norm", Table::LatentPreNorm, *size);
                    let normed = self.scratch("latent_normed", *size);
                    let norm = norm_of(1, *pre_eps, NormScale::After);
                    self.norm("latent.pre_norm", part, norm, out, weight, normed)?;
                    entering = f32_rows(normed);
                }
            }
        }

        // The routed experts.
        let (weigh_input, weighted_hidden, weighted_output) = match routing.weight_position {
            WeightPosition::Output => (None, false, true),
            WeightPosition::Input => (Some(weighted_input), false, false),
            WeightPosition::BeforeDown => (None, true, false),
        };
        let source = RowSource::Routed { top_k, num_experts };
        let others = vec![
            ("topk_ids", topk_ids),
            ("topk_weights", topk_weights),
            ("expert_slots", expert_slots),
            ("sorted_rows", sorted_rows),
            ("tiles", tiles),
        ];
        let mlp = Mlp {
            names: ["experts.gate_up", "experts.down"],
            mlp: experts,
            width,
            groups: num_experts,
            rows: source,
            rows_per_token: top_k,
            weigh_input,
            weighted_hidden,
            scratch: ["hidden", "expert_out"],
        };
        let mut expert_out = self.mlp(&mlp, entering, &others)?;
        match latent {
            None | Some(Latent { size: _, format: _, norm: LatentNorm::None | LatentNorm::Reduced { eps: _ } }) => {}
            Some(Latent { size, format: _, norm: LatentNorm::PreAndPost { pre_eps: _, post_eps } }) => {
                let weight = self.table("latent_post_norm", Table::LatentPostNorm, *size);
                let normed = self.scratch("expert_normed", top_k * size);
                let norm = norm_of(top_k, *post_eps, NormScale::Before);
                self.norm("latent.post_norm", part, norm, expert_out, weight, normed)?;
                expert_out = normed;
            }
        }

        // The shared experts.
        let mut shared_buffers = vec![];
        let mut shared_rows = None;
        if let Some(SharedExperts { mlp, gate, combination }) = shared {
            let mlps = self.spec.shared_mlps();
            let mlp = Mlp {
                names: ["shared.gate_up", "shared.down"],
                mlp,
                width: hidden_size,
                groups: mlps,
                rows: RowSource::Direct { groups: mlps },
                rows_per_token: mlps,
                weigh_input: None,
                weighted_hidden: false,
                scratch: ["shared_hidden", "shared_out"],
            };
            shared_buffers.push(("shared_out", self.mlp(&mlp, x, &[])?));
            let factor = match gate {
                SharedGate::None => SharedFactor::One,
                SharedGate::Sigmoid { format } => {
                    let out = self.scratch("shared_gate", 1);
                    let shape = [1, hidden_size];
                    self.project("shared.gate", part, x, shape, *format, false, Epilogue::Sums, out, vec![])?;
                    shared_buffers.push(("shared_gate", out));
                    SharedFactor::SigmoidOfGate
                }
                SharedGate::Joint => {
                    shared_buffers.extend(shared_weights.map(|buffer| ("shared_weights", buffer)));
                    SharedFactor::Share
                }
            };
            let average = match combination {
                SharedCombination::Sum => false,
                SharedCombination::Average => true,
            };
            shared_rows = Some(SharedRows { mlps, factor, average });
        }

        // Their sums.
        let rho = routing.routed_scaling_factor;
        let slots = Combine {
            hidden_size: width,
            routed: Routed::Slots {
                num_experts,
                selectable: self.spec.selectable(),
                top_k,
                weighted: weighted_output,
                identity: match routing.zero_experts {
                    Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity }) => Some(input),
                    Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) | None => None,
                },
                order: combine_order,
            },
            output_scale: if routing.apply_routed_scale_to_output { rho } else { 1.0 },
            output_bias: false,
            shared: None,
            rounding: combine,
            model,
            output: FloatType::F32,
        };
        let routed_buffers = [("topk_ids", topk_ids), ("topk_weights", topk_weights), ("rows", x.buffer)];
        let mut last = Combine { output_bias: *output_bias, shared: shared_rows, output, ..slots.clone() };
        if let Some(Latent { size, format, norm }) = latent {
            let mut reduced = self.scratch("reduced", *size);
            let mut buffers = routed_buffers.to_vec();
            buffers.extend([("expert_out", expert_out), ("out", reduced)]);
            self.combine("reduce", slots, &buffers)?;
            match norm {
                LatentNorm::None | LatentNorm::PreAndPost { pre_eps: _, post_eps: _ } => {}
                LatentNorm::Reduced { eps } => {
                    let weight = self.table("latent_norm", Table::LatentReducedNorm, *size);
                    let normed = self.scratch("reduced_normed", *size);
                    self.norm("latent.norm", part, norm_of(1, *eps, NormScale::After), reduced, weight, normed)?;
                    reduced = normed;
                }
            }
            let up = self.scratch("latent_up", hidden_size);
            let shape = [hidden_size, *size];
            self.project("latent.up", part, f32_rows(reduced), shape, *format, false, Epilogue::Sums, up, vec![])?;
            expert_out = up;
            last = Combine { hidden_size, routed: Routed::Row, output_scale: 1.0, ..last };
        }
        let mut buffers = routed_buffers.to_vec();
        buffers.push(("expert_out", expert_out));
        buffers.extend(shared_buffers);
        if *output_bias {
            buffers.push(("output_bias", self.table("output_bias", Table::OutputBias, hidden_size)));
        }
        let out = self.token_buffer("output", Contents::Output, hidden_size * output.bytes());
        let Some(OutputNorm { eps }) = *output_norm else {
            buffers.push(("out", out));
            return self.combine("combine", last, &buffers);
        };
        let (sum, normed) = (self.scratch("joined", hidden_size), self.scratch("joined_normed", hidden_size));
        buffers.push(("out", sum));
        let joined = Combine { output: FloatType::F32, ..last };
        // What is left is the cast to the output type.
        let cast = Combine {
            routed: Routed::Row,
            output_scale: 1.0,
            output_bias: false,
            shared: None,
            rounding: CombineRounding::F32,
            output,
            ..joined.clone()
        };
        self.combine("combine", joined, &buffers)?;
        let weight = self.table("output_norm", Table::OutputNorm, hidden_size);
        let norm = Norm { cols: hidden_size, ..norm_of(1, eps, NormScale::After) };
        self.norm("output_norm", part, norm, sum, weight, normed)?;
        self.combine("output", cast, &[("expert_out", normed), ("out", out)])
    }

    fn combine(&mut self, name: &'static str, combine: Combine, buffers: &[(&'static str, usize)]) -> Result<()> {
        // 64 invocations a workgroup, one word each; beyond the limit the kernel strides.
        let extent = Extent::PerToken { items: combine.hidden_size, per: 64, limit: 8192 };
        let grid = Grid { x: extent, y: Extent::Fixed(1) };
        let step = self.step(name, Part::Experts, Operation::Combine(combine), grid, buffers)?;
        self.drafts.push(Draft::Step(step));
        Ok(())
    }

    /// Both GEMMs of one MLP a group; the buffer of its rows.
    fn mlp(&mut self, mlp: &Mlp<'_>, input: Rows, others: &[(&'static str, usize)]) -> Result<usize> {
        let Mlp { names, mlp, width, groups, rows, rows_per_token, weigh_input, weighted_hidden, scratch } = *mlp;
        let ExpertMlp {
            intermediate_size,
            activation,
            gate_up_layout: _, // a matter of how the checkpoint is read
            orientation: _,    // likewise
            gate_up_bias,
            down_bias,
            format,
            activation_quant: _, // refused by `landed`
        } = *mlp;
        let pair = if activation.gated() { 2 } else { 1 };
        let shape = [pair * intermediate_size, width];
        let gate_up = self.place(names[0], groups, shape, format, pair, gate_up_bias)?;
        let down = self.place(names[1], groups, [width, intermediate_size], format, 1, down_bias)?;
        let hidden = self.scratch(scratch[0], rows_per_token * intermediate_size);
        let out = self.scratch(scratch[1], rows_per_token * width);
        let epilogue = Epilogue::Activation {
            activation,
            gate_up: self.spec.precision.gate_up,
            rounding: self.spec.precision.activation,
            weighted: weighted_hidden,
        };
        let part = Part::Experts;
        self.drafts.push(Draft::Gemm(Gemm {
            name: names[0],
            part,
            rows,
            input,
            input_divisor: rows_per_token,
            weigh_input,
            placed: gate_up,
            epilogue,
            out: hidden,
            others: others.to_vec(),
        }));
        self.drafts.push(Draft::Gemm(Gemm {
            name: names[1],
            part,
            rows,
            input: Rows::floats(hidden, FloatType::F32),
            input_divisor: 1,
            weigh_input: None,
            placed: down,
            epilogue: Epilogue::Sums,
            out,
            others: others.to_vec(),
        }));
        Ok(out)
    }
}

/// One MLP a group, as the layer uses it.
#[derive(Clone, Copy)]
struct Mlp<'a> {
    /// Of the two matrices.
    names: [&'static str; 2],
    mlp: &'a ExpertMlp,
    /// Width of its input and output.
    width: usize,
    groups: usize,
    rows: RowSource,
    rows_per_token: usize,
    weigh_input: Option<Rounding>,
    weighted_hidden: bool,
    /// Names of the activation's and of the output's buffers.
    scratch: [&'static str; 2],
}
