"""Save Frames: in place of Save Video, whose codec would hide what two videos differ in."""
from comfy_api.latest import io, ui


class SaveFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RepriseTestbed_SaveFrames", display_name="Test Bed Save Frames", category="Reprise test bed",
            description="Saves every frame of a video as a picture, without loss.",
            inputs=[io.Video.Input("video")], outputs=[], is_output_node=True,
        )

    @classmethod
    def execute(cls, video) -> io.NodeOutput:
        return io.NodeOutput(ui=ui.PreviewImage(video.get_components().images, cls=cls))
