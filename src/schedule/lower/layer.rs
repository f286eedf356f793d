//! Ids and weights to the output.
//!
//! A long file: the steps of a layer in their order.

use super::*;

impl Lowering<'_> {
    /// Ids and weights to the output.
    pub(super) fn layer(&mut self, hidden_states: Rows, routed: &RoutedBuffers) -> Result<()> {
        let part = Part::Experts;
        let MoeSpec {
            hidden_size,
            num_experts: _,
            top_k: _,
            router: _,
            routing,
            experts,
            shared,
            latent,
            lora,
            expert_input,
            output_bias,
            output_norm,
            placement,
            shard,
            common_terms: _,
            entry: _,
            precision,
        } = self.spec;
        let (hidden_size, num_slots, top_k) = (*hidden_size, self.spec.num_slots(), self.spec.rows_per_token());
        let common_terms = self.spec.adds_common_terms();
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
        let RoutedBuffers { row_slots, ref buffers, shared_weights } = *routed;
        let f32_rows = |buffer| Rows::floats(buffer, FloatType::F32);
        let x = match expert_input {
            ExpertInput::Hidden => hidden_states,
            ExpertInput::Separate => {
                let bytes = hidden_size * input.bytes();
                let buffer = self.token_buffer("expert_hidden_states", Contents::ExpertHiddenStates, bytes);
                Rows::floats(buffer, input)
            }
        };
        let rows = self.schedule.chunk_tokens * top_k;
        let sorted_rows = self.scratch("sorted_rows", top_k);
        let cuts = Cut::ALL.into_iter().filter(|&cut| cut != Cut::Gemv);
        let largest = |cut| self.permute(cut).max_tiles(self.most_tokens(cut).saturating_mul(top_k).min(rows));
        let most = cuts.clone().map(largest).max().unwrap_or(0);
        let tiles = self.buffer("tiles", Contents::Scratch, (1 + most) * 16);
        let grid = Grid { x: Extent::Fixed(num_slots), y: Extent::Fixed(1) };
        let mut others = buffers.clone();
        others.extend([("sorted_rows", sorted_rows), ("tiles", tiles)]);
        let step = |cut| {
            let step = self.step("permute", part, Operation::Permute(self.permute(cut)), grid, &others)?;
            Ok::<_, Error>((cut, step))
        };
        let steps = cuts.map(step).collect::<Result<_>>()?;
        self.drafts.push(Draft::ByCut(steps));

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
        let source = RowSource::Routed { top_k, num_slots };
        let adapters = match lora {
            None => None,
            Some(Lora { num_adapters, rank, format, delta }) => {
                let ids = self.token_buffer("adapter_ids", Contents::AdapterIds, 4);
                let mut buffers = vec![("row_slots", row_slots), ("adapter_ids", ids)];
                let by = AssignBy::Adapter { num_adapters: *num_adapters };
                let slots = self.assign_rows("lora.assign", num_slots, by, &mut buffers)?;
                let (groups, rank, delta) = (num_adapters * num_slots, *rank, *delta);
                Some(Adapters { slots, groups, rank, parts: format.parts(), delta })
            }
        };
        let (_, inner) = shard.columns(experts.intermediate_size);
        let parts = shard_parts(experts.format, *shard).unwrap_or([experts.format.parts(); 2]);
        let mlp = Mlp {
            names: ["experts.gate_up", "experts.down"],
            mlp: experts,
            width,
            inner,
            parts,
            owns_down_bias: shard.owns_down_bias(),
            adapters,
            others: &others,
            groups: num_slots,
            rows: source,
            rows_per_token: top_k,
            weigh_input,
            weighted_hidden,
            weighted_rows: combine == CombineRounding::WeightedRows
                && model == FloatType::Bf16
                && weighted_output
                && !self.spec.entry.is_batched()
                && routing.zero_experts.is_none()
                && latent.is_none()
                && lora.is_none()
                && self.counters.is_none(),
            scratch: ScratchNames {
                names: ["experts.input", "experts.hidden"],
                gate_up: "gate_up",
                hidden: "hidden",
                out: "expert_out",
            },
            slot: 2,
            tables: [
                ("experts.input_scales", Table::ExpertInputScales(Gemms::GateUp)),
                ("experts.hidden_scales", Table::ExpertInputScales(Gemms::Down)),
            ],
        };
        let mut expert_out = self.mlp(&mlp, entering)?;
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
        let average_of = |combination: &SharedCombination| match combination {
            SharedCombination::Sum => false,
            SharedCombination::Average => true,
        };
        if let (Some(SharedExperts { mlp: _, gate: _, combination }), false) = (shared, common_terms) {
            shared_rows = Some(SharedRows { mlps: 0, factor: SharedFactor::One, average: average_of(combination) });
        }
        if let (Some(SharedExperts { mlp, gate, combination }), true) = (shared, common_terms) {
            let mlps = self.spec.shared_mlps();
            let mlp = Mlp {
                names: ["shared.gate_up", "shared.down"],
                mlp,
                width: hidden_size,
                inner: mlp.intermediate_size,
                parts: [mlp.format.parts(); 2],
                owns_down_bias: true,
                adapters: None,
                others: &[],
                groups: mlps,
                rows: RowSource::Direct { groups: mlps },
                rows_per_token: mlps,
                weigh_input: None,
                weighted_hidden: false,
                weighted_rows: false,
                scratch: ScratchNames {
                    names: ["shared.input", "shared.hidden"],
                    gate_up: "shared_gate_up",
                    hidden: "shared_hidden",
                    out: "shared_out",
                },
                slot: 6,
                tables: [
                    ("shared.input_scales", Table::SharedInputScales(Gemms::GateUp)),
                    ("shared.hidden_scales", Table::SharedInputScales(Gemms::Down)),
                ],
            };
            shared_buffers.push(("shared_out", self.mlp(&mlp, x)?));
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
            shared_rows = Some(SharedRows { mlps, factor, average: average_of(combination) });
        }

        // Their sums.
        let rho = routing.routed_scaling_factor;
        let slots = Combine {
            hidden_size: width,
            routed: Routed::Slots {
                num_slots,
                selectable: num_slots + routing.zero_experts.map_or(0, |zero| zero.count),
                top_k,
                weighted: weighted_output && !self.spec.entry.is_batched(),
                identity: match routing.zero_experts {
                    Some(ZeroExperts { count: _, kind: ZeroExpertKind::Identity }) => {
                        Some(input).filter(|_| common_terms)
                    }
                    Some(ZeroExperts { count: _, kind: ZeroExpertKind::Skip }) | None => None,
                },
                order: combine_order,
                slots_in_order: match placement {
                    Placement::All | Placement::Range { first: _, count: _ } => true,
                    // One slot a row is in order.
                    Placement::Map { num_slots: _, replicas: _, slots: _ } => self.spec.entry.is_batched(),
                },
            },
            output_scale: if routing.apply_routed_scale_to_output { rho } else { 1.0 },
            output_bias: false,
            shared: None,
            rows: FloatType::F32,
            rounding: combine,
            model,
            output: FloatType::F32,
            vectors: false,
        };
        let mut routed_buffers = routed.buffers.clone();
        routed_buffers.push(("rows", x.buffer));
        let output_bias = *output_bias && common_terms;
        let mut last = Combine { output_bias, shared: shared_rows, output, ..slots.clone() };
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
        let storage = |combine: &Combine| {
            let bindings = Operation::Combine(combine.clone()).source().bindings;
            bindings.iter().filter(|binding| binding.access != Access::Uniform).count()
        };
        if storage(&last) > STORAGE_BUFFERS {
            // More than a kernel may bind: the slots first, then what joins their sum.
            let reduced = self.scratch("reduced", hidden_size);
            let slots = Combine { output_bias: false, shared: None, output: FloatType::F32, ..last.clone() };
            let mut buffers = routed_buffers.to_vec();
            buffers.extend([("expert_out", expert_out), ("out", reduced)]);
            self.combine("reduce", slots, &buffers)?;
            expert_out = reduced;
            last = Combine { routed: Routed::Row, output_scale: 1.0, ..last };
        }
        let mut buffers = routed_buffers.to_vec();
        buffers.push(("expert_out", expert_out));
        buffers.extend(shared_buffers);
        if output_bias {
            buffers.push(("output_bias", self.table("output_bias", Table::OutputBias, hidden_size)));
        }
        let out = self.token_buffer("output", Contents::Output, hidden_size * output.bytes());
        let infinite = (Counted::Infinite(output), [1, hidden_size], [("rows", out)]);
        let Some(OutputNorm { eps }) = *output_norm else {
            buffers.push(("out", out));
            self.combine("combine", last, &buffers)?;
            return self.diagnose(part, infinite.0, infinite.1, Matrices::Groups, 1, &infinite.2);
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
        self.combine("output", cast, &[("expert_out", normed), ("out", out)])?;
        self.diagnose(part, infinite.0, infinite.1, Matrices::Groups, 1, &infinite.2)
    }

    /// The rows of the routed experts in calls of this cut.
    pub(super) fn permute(&self, cut: Cut) -> Permute {
        let tile_rows = self.tile_rows(cut, self.units_of(cut), self.fills_tiles());
        Permute {
            num_slots: self.spec.num_slots(),
            top_k: self.spec.rows_per_token(),
            tile_rows,
            full_tiles: tile_rows == WGMMA_CODE_ROWS,
            warps: self.facts.matrix_units != Units::None,
        }
    }

    fn combine(&mut self, name: &'static str, combine: Combine, buffers: &[(&'static str, usize)]) -> Result<()> {
        let step = |combine: Combine| {
            // Beyond the limit the kernel strides.
            let x = Extent::PerToken { items: combine.hidden_size, per: combine.workgroup_columns(), limit: 8192 };
            let grid = Grid { x, y: Extent::Fixed(1) };
            self.step(name, Part::Experts, Operation::Combine(combine), grid, buffers)
        };
        let draft = match combine.of_weighted_rows().filter(|_| self.weighted_rows) {
            Some(narrow) => by_cut(|cut| step(if cut == Cut::Gemv { combine.clone() } else { narrow.clone() }))?,
            None => Draft::Step(step(combine)?),
        };
        self.drafts.push(draft);
        Ok(())
    }

    /// Both GEMMs of one MLP a group, and what quantises their rows; the buffer of its rows.
    fn mlp(&mut self, whole: &Mlp<'_>, input: Rows) -> Result<usize> {
        let Mlp {
            names,
            mlp,
            width,
            inner: intermediate_size,
            parts,
            owns_down_bias,
            adapters,
            others,
            groups,
            rows,
            rows_per_token,
            weigh_input,
            weighted_hidden,
            weighted_rows,
            scratch,
            tables,
            slot,
        } = *whole;
        let ExpertMlp {
            intermediate_size: _, // of which `inner` columns are here
            activation,
            gate_up_layout: _, // a matter of how the checkpoint is read
            orientation: _,    // likewise
            gate_up_bias,
            down_bias,
            format: _, // taken apart in `parts`
            activation_quant,
        } = *mlp;
        let part = Part::Experts;
        let pair = if activation.gated() { 2 } else { 1 };
        let shape = [pair * intermediate_size, width];
        let gate_up = self.place(names[0], groups, shape, parts[0], pair, gate_up_bias)?;
        let down_bias = down_bias && owns_down_bias;
        let down = self.place(names[1], groups, [width, intermediate_size], parts[1], 1, down_bias)?;
        let out = self.scratch(scratch.out, rows_per_token * width);
        let activated = Activated {
            activation,
            gate_up: self.spec.precision.gate_up,
            rounding: self.spec.precision.activation,
            weighted: weighted_hidden,
        };
        let matrices = match rows {
            RowSource::Direct { groups: _ } => Matrices::Groups,
            RowSource::Routed { top_k: _, num_slots } => Matrices::Slots(num_slots),
        };
        let quantizer = Quantizer { quant: activation_quant, matrices, rows_per_token };
        let mut first = FirstGemm { input, divisor: rows_per_token, weigh: weigh_input };
        // Adapters read what enters before it is quantised.
        let mut delta = None;
        if let Some(adapters) = &adapters {
            let names = ["lora.gate_up_a", "lora.gate_up_b"];
            delta = Some(self.adapter(adapters, names, first, [width, shape[0]], pair, whole)?);
        }
        if activation_quant.is_on() {
            first =
                self.quantize_input(&quantizer, first, width, [scratch.names[0], tables[0].0], tables[0].1, others)?;
            let because = "WGSL has no such type: codes widen to f32, in which their products are exact";
            if let RowValues::Codes { code, group: _, scales: _ } = first.input.values {
                let choice = match code {
                    ActivationCode::E4m3 => "emulated FP8",
                    ActivationCode::Int8 => "emulated INT8",
                };
                self.decide(names[0], choice, because);
                let by_token = first.divisor == rows_per_token && rows_per_token > 1;
                let (rows, matrices) = if by_token { (1, Matrices::Groups) } else { (rows_per_token, matrices) };
                let mut buffers = others.to_vec();
                buffers.push(("rows", first.input.buffer));
                self.diagnose(part, Counted::SaturatedCodes(code), [rows, width], matrices, slot + 2, &buffers)?;
            }
        }
        let fused = self.fuses(names[0], activation_quant, adapters.is_some());
        let (epilogue, hidden) = match fused || adapters.is_some() {
            true => (Epilogue::Sums, self.scratch(scratch.gate_up, rows_per_token * pair * intermediate_size)),
            false => {
                (Epilogue::Activation(activated), self.scratch(scratch.hidden, rows_per_token * intermediate_size))
            }
        };
        let mut gemm = Gemm {
            name: names[0],
            part,
            rows,
            input: first.input,
            input_divisor: first.divisor,
            weigh_input: first.weigh,
            placed: gate_up,
            delta: adapters.map(|adapters| adapters.delta),
            adapter: false,
            narrow: Narrow::Neither,
            weighted: false,
            epilogue,
            out: hidden,
            others: others.iter().copied().chain(delta.map(|delta| ("delta", delta))).collect(),
        };
        let mut second = Gemm {
            name: names[1],
            part,
            rows,
            input: Rows::floats(hidden, FloatType::F32),
            input_divisor: 1,
            weigh_input: None,
            placed: down,
            delta: None,
            adapter: false,
            narrow: Narrow::Neither,
            weighted: false,
            epilogue: Epilogue::Sums,
            out,
            others: others.to_vec(),
        };
        let rounded = match self.spec.precision.activation {
            ActivationRounding::F32 => false,
            ActivationRounding::Fused | ActivationRounding::Torch => self.spec.precision.model == FloatType::Bf16,
        };
        let read_by_others = adapters.is_some() || self.counters.is_some();
        // What is rounded to bf16 is stored as that where the first GEMM is on matrix units and who reads it can.
        let narrow = rounded
            && !read_by_others
            && !fused
            && self.fits_units(&gemm, gemm.input.values)
            && (activation_quant.is_on() || self.fits_units(&second, RowValues::Floats(FloatType::Bf16)));
        if narrow {
            gemm.narrow = Narrow::Out;
            second.narrow = if activation_quant.is_on() { Narrow::Neither } else { Narrow::Rows };
        }
        self.drafts.push(Draft::Gemm(gemm.clone()));
        if self.counters.is_some() && clamps(activation) {
            // Sums that the layer itself has only in registers are computed once more.
            let sums = match epilogue {
                Epilogue::Sums => hidden,
                Epilogue::Activation(_) | Epilogue::AddState | Epilogue::GeluErf | Epilogue::Weighted => {
                    let out = self.scratch(scratch.gate_up, rows_per_token * pair * intermediate_size);
                    let epilogue = Epilogue::Sums;
                    self.drafts.push(Draft::Gemm(Gemm { name: "diagnose.gate_up", epilogue, out, ..gemm }));
                    out
                }
            };
            let gate_up = self.spec.precision.gate_up;
            let mut buffers = others.to_vec();
            buffers.push(("rows", sums));
            let size = [rows_per_token, intermediate_size];
            let gate = Counted::ClampedGate { activation, gate_up };
            self.diagnose(part, gate, size, matrices, slot, &buffers)?;
            self.diagnose(part, Counted::ClampedUp { activation, gate_up }, size, matrices, slot + 1, &buffers)?;
        }
        let mut hidden = hidden;
        delta = None;
        if let Some(adapters) = &adapters {
            let out = self.scratch(scratch.hidden, rows_per_token * intermediate_size);
            let mut buffers = others.to_vec();
            buffers.extend([("rows", hidden), ("out", out)]);
            let (cols, model) = (intermediate_size, self.spec.precision.model);
            let operation = Operation::Activate(Activate { activated, rows_per_token, cols, model });
            let x = Extent::PerToken { items: rows_per_token * cols, per: 64, limit: 8192 };
            let step = self.step("experts.activation", part, operation, Grid { x, y: Extent::Fixed(1) }, &buffers)?;
            self.drafts.push(Draft::Step(step));
            hidden = out;
            let first = FirstGemm { input: Rows::floats(hidden, FloatType::F32), divisor: 1, weigh: None };
            let names = ["lora.down_a", "lora.down_b"];
            delta = Some(self.adapter(adapters, names, first, [intermediate_size, width], 1, whole)?);
        }
        second.input = match activation_quant.is_on() {
            false => Rows::floats(hidden, FloatType::F32),
            true => {
                let rows = |input| ValueSource::Rows { input, divisor: 1, weigh: None };
                let sources = match (fused, narrow) {
                    (true, _) => [ValueSource::Activated(activated); 2],
                    (false, true) => [rows(FloatType::F32), rows(FloatType::Bf16)],
                    (false, false) => [rows(FloatType::F32); 2],
                };
                let names = [scratch.names[1], tables[1].0];
                self.quantize(&quantizer, names, (sources, hidden), intermediate_size, tables[1].1, others)?
            }
        };
        if let (true, RowValues::Codes { code, group: _, scales: _ }) = (self.counters.is_some(), second.input.values) {
            let mut buffers = others.to_vec();
            buffers.push(("rows", second.input.buffer));
            let size = [rows_per_token, intermediate_size];
            self.diagnose(part, Counted::SaturatedCodes(code), size, matrices, slot + 3, &buffers)?;
        }
        second.delta = adapters.map(|adapters| adapters.delta);
        second.weighted = weighted_rows && self.fits_units(&second, second.narrowed());
        self.weighted_rows |= second.weighted;
        second.others.extend(delta.map(|delta| ("delta", delta)));
        self.drafts.push(Draft::Gemm(second));
        Ok(out)
    }

    /// What the rows' adapters add to a GEMM's sums: `B (A x)`, f32 [rows, features], 0 without adapter.
    fn adapter(
        &mut self,
        adapters: &Adapters,
        [a, b]: [&'static str; 2],
        first: FirstGemm,
        [cols, features]: [usize; 2],
        pair: usize,
        mlp: &Mlp<'_>,
    ) -> Result<usize> {
        let Adapters { slots, groups, rank, parts, delta: _ } = *adapters;
        let rows_per_token = mlp.rows_per_token;
        let inner = self.scratch(a, rows_per_token * rank);
        let out = self.scratch(b, rows_per_token * features);
        let placed = self.place(a, groups, [rank, cols], parts, 1, false)?;
        let mut others = mlp.others.to_vec();
        others.retain(|(name, _)| *name != "row_slots");
        others.push(("row_slots", slots));
        let because = "an adapter's matrices are small, and few rows share one";
        self.decide(a, "the matrix-vector kernel in every call", because);
        let gemm = Gemm {
            name: a,
            part: Part::Experts,
            rows: RowSource::Routed { top_k: rows_per_token, num_slots: groups },
            input: first.input,
            input_divisor: first.divisor,
            weigh_input: first.weigh,
            placed,
            delta: None,
            adapter: true,
            narrow: Narrow::Neither,
            weighted: false,
            epilogue: Epilogue::Sums,
            out: inner,
            others,
        };
        let placed = self.place(b, groups, [features, rank], parts, pair, false)?;
        let input = Rows::floats(inner, FloatType::F32);
        let expand = Gemm { name: b, input, input_divisor: 1, weigh_input: None, placed, out, ..gemm.clone() };
        self.drafts.extend([Draft::Gemm(gemm), Draft::Gemm(expand)]);
        Ok(out)
    }

    /// Whether the activation and the quantisation behind it are one step.
    fn fuses(&mut self, name: &'static str, quant: ActivationQuant, adapted: bool) -> bool {
        let (fused, because) = match quant {
            ActivationQuant::None => return false,
            ActivationQuant::Dynamic { code: _, span: ScaleSpan::Tensor, rule: _, scale: _ } => {
                (false, "one scale for all rows needs the largest magnitude of all of them first")
            }
            ActivationQuant::Dynamic { code: _, span: ScaleSpan::Group(_) | ScaleSpan::Token, rule: _, scale: _ } => {
                (true, "a scale follows from values of one row, and nobody else reads the activation unquantised")
            }
            ActivationQuant::Static { code: _ } => {
                (true, "the scale is known, and nobody else reads the activation unquantised")
            }
        };
        let (fused, because) = match (adapted, self.options.fuse_quantization) {
            (false, true) if matches!(self.units, Units::Warpgroups { multiprocessors: _ }) => {
                (false, "the first GEMM has time for the activation, and half as much is written and read")
            }
            (false, true) => (fused, because),
            (true, _) => (false, "adapters read the activation unquantised"),
            (false, false) => (false, "options.fuse_quantization is off"),
        };
        let choice = if fused { "activation and quantisation in one step" } else { "activation, then quantisation" };
        self.decide(name, choice, because);
        fused
    }

    /// What the first GEMM reads as codes: rows of tokens where they have one scale for all experts, rows of
    /// slots where weights or scales differ from slot to slot. Routed and shared experts share the codes of a
    /// token where both want the same.
    fn quantize_input(
        &mut self,
        quantizer: &Quantizer,
        first: FirstGemm,
        width: usize,
        names: [&'static str; 2],
        table: Table,
        others: &[(&'static str, usize)],
    ) -> Result<FirstGemm> {
        let FirstGemm { input, divisor, weigh } = first;
        let RowValues::Floats(float_type) = input.values else { return Ok(first) };
        let fixed = match quantizer.quant {
            ActivationQuant::Static { code: _ } => true,
            ActivationQuant::None | ActivationQuant::Dynamic { code: _, span: _, rule: _, scale: _ } => false,
        };
        // Rows that enter by slot and do not exist may hold anything.
        let by_slot = weigh.is_some() || fixed || self.spec.entry.is_batched();
        if by_slot {
            let source = ValueSource::Rows { input: float_type, divisor, weigh };
            let input = self.quantize(quantizer, names, ([source; 2], input.buffer), width, table, others)?;
            return Ok(FirstGemm { input, divisor: 1, weigh: None });
        }
        let known =
            self.quantized.iter().find(|(quant, buffer, _)| *quant == quantizer.quant && *buffer == input.buffer);
        if let Some((_, _, rows)) = known {
            return Ok(FirstGemm { input: *rows, divisor, weigh: None });
        }
        let source = ValueSource::Rows { input: float_type, divisor: 1, weigh: None };
        let by_token = Quantizer { quant: quantizer.quant, matrices: Matrices::Groups, rows_per_token: 1 };
        let rows = self.quantize(&by_token, names, ([source; 2], input.buffer), width, table, others)?;
        self.quantized.push((quantizer.quant, input.buffer, rows));
        Ok(FirstGemm { input: rows, divisor, weigh: None })
    }

    /// Codes and scales of rows, [rows_per_token of each token, cols], from values in a buffer.
    fn quantize(
        &mut self,
        quantizer: &Quantizer,
        [name, table_name]: [&'static str; 2],
        ([beside_gemv, beside_units], from): ([ValueSource; 2], usize),
        cols: usize,
        table: Table,
        others: &[(&'static str, usize)],
    ) -> Result<Rows> {
        let Quantizer { quant, matrices, rows_per_token } = *quantizer;
        let source_of = |cut| if cut == Cut::Gemv { beside_gemv } else { beside_units };
        let model = self.spec.precision.model;
        let rows = self.schedule.chunk_tokens * rows_per_token;
        let codes = self.scratch(&format!("{name}.codes"), rows_per_token * cols.div_ceil(4));
        let mut buffers = others.to_vec();
        let (code, group, scale) = match quant {
            ActivationQuant::None => return Ok(Rows::floats(from, FloatType::F32)),
            ActivationQuant::Static { code } => {
                let count = match matrices {
                    Matrices::Groups => rows_per_token,
                    Matrices::Slots(num_slots) => num_slots,
                };
                buffers.push(("fixed_scales", self.table(table_name, table, count)));
                (code, None, RowScale::Fixed(matrices))
            }
            ActivationQuant::Dynamic { code, span: ScaleSpan::Tensor, rule, scale } => {
                if self.schedule.chunk_tokens < self.schedule.max_tokens {
                    let because = format!(
                        "one scale for all rows of a call, of which only {} tokens pass at once",
                        self.schedule.chunk_tokens
                    );
                    return Err(refuse(self.facts.backend, "activation_quant.span", &ScaleSpan::Tensor, because).into());
                }
                let partial = self.buffer(format!("{name}.amax"), Contents::Scratch, 4 * AMAX_PARTS);
                buffers.push(("partial_amax", partial));
                let grid = Grid { x: Extent::Fixed(AMAX_PARTS), y: Extent::Fixed(1) };
                buffers.push(("rows", from));
                let step = |cut| {
                    let amax = Amax { source: source_of(cut), rows_per_token, cols, matrices, model };
                    self.step(format!("{name}.amax"), Part::Experts, Operation::Amax(amax), grid, &buffers)
                };
                self.drafts.push(by_cut(step)?);
                (code, None, RowScale::Tensor { rule, scale })
            }
            ActivationQuant::Dynamic { code, span: ScaleSpan::Token, rule, scale } => {
                (code, None, RowScale::Span { group: None, rule, scale, layout: ScaleLayout::RowMajor })
            }
            ActivationQuant::Dynamic { code, span: ScaleSpan::Group(group), rule, scale } => {
                let layout = match scale {
                    ActivationScale::F32 | ActivationScale::F32CeilPow2 => ScaleLayout::RowMajor,
                    ActivationScale::Ue8m0Packed => ScaleLayout::Packed,
                };
                (code, Some(group), RowScale::Span { group: Some(group), rule, scale, layout })
            }
        };
        let layout = match scale {
            RowScale::Span { group: _, rule: _, scale: _, layout } => layout,
            RowScale::Tensor { rule: _, scale: _ } | RowScale::Fixed(_) => ScaleLayout::RowMajor,
        };
        // Room for either layout of the buckets.
        let groups = cols.div_ceil(group.unwrap_or(cols));
        let words = layout.words(rows.next_multiple_of(4), groups);
        let scales = self.buffer(format!("{name}.scales"), Contents::Scratch, 4 * words);
        buffers.extend([("rows", from), ("codes", codes), ("scales", scales)]);
        let quantize = Quantize { source: beside_gemv, rows_per_token, cols, code, scale, model, warps: false };
        let (quantize, grid) = quantize_by(quantize, self.facts);
        let step = |cut| {
            let scale = match cut {
                Cut::Gemv | Cut::Pairs | Cut::Quads | Cut::Octets => scale,
                Cut::Tiles | Cut::FullTiles => by_column(scale, rows),
            };
            let operation = Operation::Quantize(Quantize { source: source_of(cut), scale, ..quantize.clone() });
            self.step(format!("{name}.quantize"), Part::Experts, operation, grid, &buffers)
        };
        self.drafts.push(by_cut(step)?);
        Ok(Rows { buffer: codes, values: RowValues::Codes { code, group, scales: layout }, scales: Some(scales) })
    }
}

/// A step that differs from cut to cut.
fn by_cut(step: impl Fn(Cut) -> Result<Step>) -> Result<Draft> {
    let steps = Cut::ALL.into_iter().map(|cut| Ok((cut, step(cut)?)));
    Ok(Draft::ByCut(steps.collect::<Result<_>>()?))
}

/// Scales as the tiled kernel reads them: those of a tile's rows beside each other.
fn by_column(scale: RowScale, rows: usize) -> RowScale {
    match scale {
        RowScale::Span { group: Some(group), rule, scale, layout: ScaleLayout::RowMajor } => {
            let layout = column_major(rows);
            RowScale::Span { group: Some(group), rule, scale, layout }
        }
        RowScale::Span { group: _, rule: _, scale: _, layout: _ }
        | RowScale::Tensor { rule: _, scale: _ }
        | RowScale::Fixed(_) => scale,
    }
}

/// Whose rows are quantised, and how.
struct Quantizer {
    quant: ActivationQuant,
    matrices: Matrices,
    rows_per_token: usize,
}

/// What the first GEMM of an MLP reads.
#[derive(Clone, Copy)]
struct FirstGemm {
    input: Rows,
    /// Its rows that share an entering row.
    divisor: usize,
    weigh: Option<Rounding>,
}

/// Names of an MLP's buffers.
#[derive(Clone, Copy)]
struct ScratchNames {
    /// Of what is quantised before each GEMM.
    names: [&'static str; 2],
    gate_up: &'static str,
    hidden: &'static str,
    out: &'static str,
}

/// The adapters of an MLP.
#[derive(Clone, Copy)]
struct Adapters {
    /// The buffer that says which of their matrices a row meets.
    slots: usize,
    /// Matrices of a kind: adapters times slots.
    groups: usize,
    rank: usize,
    parts: Parts,
    delta: LoraDelta,
}

/// One MLP a group, as the layer uses it.
#[derive(Clone, Copy)]
struct Mlp<'a> {
    /// Of the two matrices.
    names: [&'static str; 2],
    mlp: &'a ExpertMlp,
    /// Width of its input and output.
    width: usize,
    /// Columns of its intermediate size that are here.
    inner: usize,
    /// Codes and scales of the two matrices.
    parts: [Parts; 2],
    /// Whether its down bias is added here.
    owns_down_bias: bool,
    adapters: Option<Adapters>,
    /// Buffers of the bindings that only some of its steps have.
    others: &'a [(&'static str, usize)],
    groups: usize,
    rows: RowSource,
    rows_per_token: usize,
    weigh_input: Option<Rounding>,
    weighted_hidden: bool,
    /// Whether nothing but their sum reads the rows, weighted and rounded to bf16.
    weighted_rows: bool,
    scratch: ScratchNames,
    /// First counter of its diagnostics.
    slot: usize,
    /// Tables of static scales, by GEMM.
    tables: [(&'static str, Table); 2],
}
