import java.io.FileInputStream;
import java.io.ObjectInputStream;
import java.util.TreeSet;
import java.util.zip.GZIPInputStream;
import org.codehaus.mojo.animal_sniffer.Clazz;

/** Prints a list of Animal Sniffer: a line for each class with what it extends, then its members. */
public class Signatures {
    public static void main(String[] arguments) throws Exception {
        try (ObjectInputStream in =
                new ObjectInputStream(new GZIPInputStream(new FileInputStream(arguments[0])))) {
            for (Clazz next = (Clazz) in.readObject(); next != null; next = (Clazz) in.readObject()) {
                String parent = next.getSuperClass() == null ? "" : next.getSuperClass();
                String interfaces = String.join(" ", next.getSuperInterfaces());
                System.out.println((next.getName() + " " + parent + " " + interfaces).trim());
                for (Object member : new TreeSet<Object>(next.getSignatures())) {
                    System.out.println("\t" + member);
                }
            }
        }
    }
}
