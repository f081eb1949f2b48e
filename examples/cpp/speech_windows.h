// Recordings cut into windows that a model takes, at the quietest points: lora_speech/data/windows.py, where
// the thresholds are explained.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace transcribe {

struct Window {
  int64_t begin, end;  // samples
};

namespace detail {

inline std::vector<double> frame_levels(const std::vector<float>& samples, int64_t hop) {
  const int64_t length = static_cast<int64_t>(samples.size()), count = (length + hop - 1) / hop;
  std::vector<double> levels(count);
  for (int64_t frame = 0; frame < count; ++frame) {
    double power = 0;
    for (int64_t i = frame * hop; i < std::min((frame + 1) * hop, length); ++i)
      power += static_cast<double>(samples[i]) * samples[i];
    levels[frame] = 10.0 * std::log10(power / static_cast<double>(hop) + 1e-12);
  }
  return levels;
}

inline double percentile(std::vector<double> values, double percent) {
  std::sort(values.begin(), values.end());
  const double place = percent / 100.0 * static_cast<double>(values.size() - 1);
  const size_t below = static_cast<size_t>(place), above = std::min(below + 1, values.size() - 1);
  return values[below] + (values[above] - values[below]) * (place - static_cast<double>(below));
}

inline double speech_threshold(const std::vector<double>& levels) {
  constexpr double kSilence = -60.0, kRange = 35.0;  // dB
  const double floor = percentile(levels, 10), peak = percentile(levels, 99);
  if (peak - floor < 6.0) return std::max(kSilence, *std::min_element(levels.begin(), levels.end()) - 1.0);
  return std::max({kSilence, peak - kRange, floor + (peak - floor) / 3.0 - 3.0});
}

inline std::vector<double> smoothed(const std::vector<double>& levels) {
  constexpr int64_t kWidth = 15;  // frames: a syllable
  const int64_t count = static_cast<int64_t>(levels.size());
  std::vector<double> smooth(count);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = std::max<int64_t>(0, i - kWidth / 2); j <= std::min(count - 1, i + kWidth / 2); ++j)
      smooth[i] += levels[j] / kWidth;
  return smooth;
}

}  // namespace detail

// In order, without overlap, silence left out; empty for a silent recording. None is longer than `longest` samples.
inline std::vector<Window> cut_windows(const std::vector<float>& samples, int64_t rate, int64_t longest) {
  const int64_t length = static_cast<int64_t>(samples.size());
  const int64_t hop = std::max<int64_t>(1, static_cast<int64_t>(0.02 * static_cast<double>(rate)));
  const std::vector<double> levels = detail::frame_levels(samples, hop);
  const double threshold = detail::speech_threshold(levels);
  const auto voiced = [&](int64_t frame) { return levels[frame] > threshold; };
  const int64_t total = static_cast<int64_t>(levels.size());
  if (length <= longest) {
    for (int64_t frame = 0; frame < total; ++frame)
      if (voiced(frame)) return {{0, length}};
    return {};
  }
  const std::vector<double> smooth = detail::smoothed(levels);
  const int64_t margin = static_cast<int64_t>(0.2 * static_cast<double>(rate));
  std::vector<Window> windows;
  for (int64_t position = 0; position < total;) {
    int64_t first = position;
    while (first < total && !voiced(first)) ++first;
    if (first == total) break;
    const int64_t begin = std::max(position * hop, first * hop - margin);
    const int64_t limit = (begin + longest) / hop;
    int64_t cut = total;
    if (limit < total) {  // the later half of the window: cuts rarely fall early, and windows stay long
      const int64_t half = first + (limit - first) / 2;
      cut = std::min_element(smooth.begin() + half, smooth.begin() + limit) - smooth.begin();
      cut = std::max(cut, first + 1);
    }
    int64_t last = cut;
    while (!voiced(last - 1)) --last;
    windows.push_back({begin, std::min({length, cut * hop, last * hop + margin, begin + longest})});
    position = cut;
  }
  return windows;
}

}  // namespace transcribe
