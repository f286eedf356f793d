//! A window and a Mixture-of-Experts layer on one wgpu device: the layer runs in every frame, in front of the UI.
//!
//! `cargo run --release [-- --frames N --screenshot FILE.png]`. The layer is planned twice, as its checkpoint says and
//! without the parameters that are switched off, and the window shows what these change.

use std::collections::VecDeque;

use eframe::egui::{self, Color32, Rect, Sense, Stroke, Ui, pos2, vec2};

use layer::{Kept, Layers, MAX_TOKENS, Seen, device_setup};

mod layer;

/// Frames that the plots remember.
const HISTORY: usize = 240;

fn main() -> eframe::Result {
    let mut options = eframe::NativeOptions::default();
    options.viewport.inner_size = Some(vec2(900.0, 640.0));
    options.wgpu_options.wgpu_setup = device_setup();
    eframe::run_native("moewe and egui", options, Box::new(|context| Ok(Box::new(App::new(context)?))))
}

struct App {
    layers: Layers,
    adapter: String,
    kept: Kept,
    tokens: usize,
    size: f32,
    /// Frames so far; the input moves with them.
    frame: u32,
    seen: Seen,
    frame_ms: VecDeque<f32>,
    layer_ms: VecDeque<f32>,
    error: Option<String>,
    /// For a picture that can be made again: after how many frames, and where to.
    screenshot: Option<(u32, String)>,
}

impl App {
    fn new(context: &eframe::CreationContext<'_>) -> layer::Result<Self> {
        let window = context.wgpu_render_state.as_ref().ok_or("eframe runs without wgpu")?;
        let args: Vec<String> = std::env::args().collect();
        let after = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
        let frames = after("--frames").and_then(|frames| frames.parse().ok()).unwrap_or(HISTORY as u32);
        Ok(Self {
            layers: Layers::new(window)?,
            adapter: window.adapter.get_info().name,
            kept: Kept::ALL,
            tokens: 24,
            size: 0.8,
            frame: 0,
            seen: Seen::default(),
            frame_ms: VecDeque::new(),
            layer_ms: VecDeque::new(),
            error: None,
            screenshot: after("--screenshot").map(|file| (frames, file.clone())),
        })
    }

    /// Takes what has come back and sends the next input.
    fn run(&mut self) -> layer::Result<()> {
        if let Some(seen) = self.layers.collect()? {
            seen.layer_ms.into_iter().for_each(|ms| remember(&mut self.layer_ms, ms));
            self.seen = seen;
        }
        let phase = self.frame as f32 * 0.02;
        let value = |at: usize| self.size * ((at * at % 8191) as f32 * 0.7 + phase).sin();
        let rows: Vec<f32> = (0..self.tokens * self.layers.resolved.spec.hidden_size).map(value).collect();
        self.layers.run(&rows)
    }

    fn controls(&mut self, ui: &mut Ui) {
        let (spec, before) = (&self.layers.resolved.spec, self.kept);
        ui.heading(format!("{} on {}", self.layers.resolved.family, self.adapter));
        ui.horizontal(|ui| {
            ui.add(egui::Slider::new(&mut self.tokens, 1..=MAX_TOKENS).text("tokens"));
            ui.add(egui::Slider::new(&mut self.size, 0.1..=16.0).logarithmic(true).text("size of the rows"));
        });
        ui.horizontal(|ui| {
            ui.checkbox(&mut self.kept.limit, format!("{:?}", spec.experts.activation));
            ui.checkbox(&mut self.kept.factor, format!("routed factor {}", spec.routing.routed_scaling_factor));
            ui.checkbox(&mut self.kept.bias, "selection bias");
        });
        if self.kept != before {
            self.error = self.layers.change(self.kept).err().map(|error| error.to_string());
        }
        let mean = self.seen.off.iter().sum::<f32>() / self.seen.tokens.max(1) as f32;
        let worst = self.seen.off.iter().copied().fold(0.0, f32::max);
        let told = format!("{:.1} % off in the mean, {:.1} % in the worst token", 100.0 * mean, 100.0 * worst);
        ui.label(format!("output without what is switched off: {told}"));
    }

    /// Routing weights by expert (across) and token (down), and beside them how far each token's output is off.
    fn heat_map(&self, ui: &mut Ui) {
        let (experts, top_k) = (self.layers.resolved.spec.num_experts, self.layers.resolved.spec.top_k);
        ui.label(format!(
            "routing of the last input: {experts} experts across, tokens down; to the right, how far off"
        ));
        let (area, _) = ui.allocate_exact_size(ui.available_size(), Sense::hover());
        let cell = vec2(area.width() / (experts + 2) as f32, area.height() / self.seen.tokens.max(1) as f32);
        let paint = |column: usize, token: usize, colour: Color32, share: f32| {
            let corner = area.min + vec2(column as f32 * cell.x, token as f32 * cell.y);
            let colour = Color32::from_gray(40).lerp_to_gamma(colour, share.clamp(0.0, 1.0));
            ui.painter().rect_filled(Rect::from_min_size(corner, cell).shrink(0.5), 1.0, colour);
        };
        for token in 0..self.seen.tokens {
            (0..experts).for_each(|expert| paint(expert, token, Color32::ORANGE, 0.0));
            for slot in token * top_k..(token + 1) * top_k {
                paint(self.seen.ids[slot] as usize, token, Color32::ORANGE, self.seen.weights[slot]);
            }
            paint(experts + 1, token, Color32::RED, self.seen.off[token]);
        }
    }

    /// Half of the frames with everything, half without the clamp limit; then a picture, and the end.
    fn take_picture(&mut self, context: &egui::Context, frames: u32, file: String) {
        if self.frame == frames / 2 {
            self.kept.limit = false;
            self.error = self.layers.change(self.kept).err().map(|error| error.to_string());
        }
        self.error.iter().for_each(|error| fail(error));
        if self.frame == frames {
            let shared = context.clone();
            context.request_screenshot(move |image| {
                let [width, height] = image.size.map(|side| side as u32);
                let saved = image::save_buffer(&file, image.as_raw(), width, height, image::ColorType::Rgba8);
                saved.unwrap_or_else(|error| fail(&format!("{file}: {error}")));
                shared.send_viewport_cmd(egui::ViewportCommand::Close);
            });
        }
    }
}

/// For a script that asks for a picture.
fn fail(error: &str) {
    eprintln!("{error}");
    std::process::exit(1);
}

fn remember(values: &mut VecDeque<f32>, value: f32) {
    values.push_back(value);
    if values.len() > HISTORY {
        values.pop_front();
    }
}

/// Milliseconds over the last frames, up to twice their median.
fn plot(ui: &mut Ui, what: &str, values: &VecDeque<f32>, colour: Color32) {
    let mut sorted: Vec<f32> = values.iter().copied().collect();
    sorted.sort_by(f32::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    let most = sorted.last().copied().unwrap_or(0.0);
    ui.label(format!("{what}: median {median:.2} ms, most {most:.2} ms"));
    let (area, _) = ui.allocate_exact_size(vec2(ui.available_width(), 70.0), Sense::hover());
    ui.painter().rect_filled(area, 2.0, Color32::from_gray(15));
    let x = |at: usize| area.left() + area.width() * at as f32 / HISTORY as f32;
    let y = |ms: f32| area.bottom() - area.height() * (0.5 * ms / median.max(1e-6)).min(1.0);
    let points = values.iter().enumerate().map(|(at, ms)| pos2(x(at), y(*ms))).collect();
    ui.painter().line(points, Stroke::new(1.5, colour));
}

impl eframe::App for App {
    fn ui(&mut self, ui: &mut Ui, _frame: &mut eframe::Frame) {
        if let Err(error) = self.run() {
            self.error = Some(error.to_string());
        }
        remember(&mut self.frame_ms, 1e3 * ui.input(|input| input.unstable_dt));
        egui::CentralPanel::default().show(ui, |ui| {
            self.controls(ui);
            if let Some(error) = &self.error {
                ui.colored_label(Color32::RED, error);
            }
            ui.columns(2, |columns| {
                plot(&mut columns[0], "frame", &self.frame_ms, Color32::LIGHT_BLUE);
                plot(&mut columns[1], "layer, by the GPU's clock", &self.layer_ms, Color32::LIGHT_GREEN);
            });
            self.heat_map(ui);
        });
        self.frame += 1;
        if let Some((frames, file)) = self.screenshot.clone() {
            self.take_picture(ui.ctx(), frames, file);
        }
        // The layer runs in each frame, so there is always a next one.
        ui.ctx().request_repaint();
    }
}
