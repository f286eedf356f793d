//! Known-answer tests of what WGSL leaves to the device, before a kernel relies on it.

use ::wgpu;

use super::Wgpu;
use crate::error::Result;

/// What the device has proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proofs {
    /// It unpacks each binary16 exactly, subnormals, infinities and NaN included.
    pub exact_halves: bool,
}

impl Proofs {
    /// What holds where nothing could be proved.
    const NONE: Self = Self { exact_halves: false };
}

impl Wgpu {
    /// What the device has proved, found out once: the first call runs small kernels and waits for them. Where
    /// waiting is impossible (a browser), or the device fails, nothing is proved.
    pub fn proofs(&self) -> Proofs {
        *self.proofs.get_or_init(|| {
            if cfg!(target_arch = "wasm32") {
                return Proofs::NONE;
            }
            Proofs { exact_halves: self.wrong_halves().is_ok_and(|wrong| wrong == Some(0)) }
        })
    }

    /// How many binary16 the device unpacks wrongly; `None` if it did not answer.
    fn wrong_halves(&self) -> Result<Option<u32>> {
        let text = concat!(
            "@group(0) @binding(0) var<storage, read_write> wrong: atomic<u32>;\n",
            include_str!("../../../shaders/fragments/decode_f16.wgsl"),
            include_str!("../../../shaders/proof/halves.wgsl"),
        );
        let back = self.scoped(&|| "proving how the device unpacks binary16".into(), || {
            let (device, usages) = (self.device(), wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::STORAGE);
            let buffer = |label, usage| {
                device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some(label),
                    size: 4,
                    usage,
                    mapped_at_creation: false,
                })
            };
            let wrong = buffer("wrong", usages);
            let back = buffer("wrong_back", wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some("proof/halves"),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some("proof/halves"),
                layout: None,
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            });
            let binding = device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.get_bind_group_layout(0),
                entries: &[wgpu::BindGroupEntry { binding: 0, resource: wrong.as_entire_binding() }],
            });
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                pass.set_pipeline(&pipeline);
                pass.set_bind_group(0, &binding, &[]);
                pass.dispatch_workgroups(256, 1, 1);
            }
            encoder.copy_buffer_to_buffer(&wrong, 0, &back, 0, 4);
            self.queue().submit([encoder.finish()]);
            back.map_async(wgpu::MapMode::Read, .., |_| {});
            // Whether that came about shows in what is mapped.
            let _ = device.poll(wgpu::PollType::wait_indefinitely());
            back
        })?;
        let words = back.get_mapped_range(..);
        Ok(words.ok().and_then(|bytes| bytemuck::pod_read_unaligned::<[u32; 1]>(&bytes[..]).first().copied()))
    }
}
